use std::fs;
use std::io::Write as _;
use std::process::Command;

use super::*;
use crate::tool;

/// Whether QEMU's tools are there; says so past the capture of the test harness where they are not.
fn tools() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    let required = std::env::var_os("KVMSNAP_REQUIRE_QEMU").is_some_and(|value| value == "1");
    assert!(found || !required, "qemu-img is not installed, and KVMSNAP_REQUIRE_QEMU=1");
    if !found {
        std::io::stderr().write_all(b"SKIPPED: qemu-img is not installed\n").unwrap();
    }
    found
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn look(path: &Path) -> Result<Inspected, ImageError> {
    inspect(path, Format::Qcow2, &Policy::default())
}

fn refusal(path: &Path, policy: &Policy) -> InspectError {
    match inspect(path, Format::Qcow2, policy) {
        Err(ImageError::Refused { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn images_of_all_kinds_that_qemu_makes_are_read() {
    if !tools() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    let kinds = [
        "compat=0.10",
        "compat=1.1",
        "lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "compression_type=zstd",
        "refcount_bits=1",
        "refcount_bits=64",
        "preallocation=metadata",
    ];
    for kind in kinds {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", kind, name, "64M"]);
        qemu_img(&["snapshot", "-c", "before", name]);
        if kind != "compat=0.10" {
            qemu_img(&["bitmap", "--add", name, "bitmap"]);
        }
        let seen = look(&path).unwrap_or_else(|error| panic!("{kind}: {error:?}"));
        let header = seen.header.unwrap();
        assert_eq!((seen.size, header.snapshots), (64 << 20, 1), "{kind}");
        assert_eq!(header.bitmaps, u32::from(kind != "compat=0.10"), "{kind}");
    }
    qemu_img(&["create", "-q", "-f", "qcow2", name, "64T"]);
    assert_eq!(look(&path).unwrap().size, qcow2::SIZE_MAX);
    qemu_img(&["create", "-q", "-f", "qcow2", name, "0"]);
    assert_eq!(look(&path).unwrap().size, 0);
}

#[tokio::test]
async fn s02_images_beneath_are_taken_only_from_folders_that_are_allowed() {
    if !tools() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [inside, outside] = ["inside", "outside"].map(|name| folder.path().join(name));
    [&inside, &outside].iter().for_each(|folder| fs::create_dir(folder).unwrap());
    let allowed = Policy { backing_folders: vec![inside.clone()], ..Policy::default() };
    let top = inside.join("top, with: odd 'name'");
    let make = |base: &str, format: &str| {
        let create = ["create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", format];
        let top = format!("file:{}", top.display());
        qemu_img(&[&create[..], &[&top, "1M"]].concat());
    };
    for folder in [&inside, &outside] {
        fs::write(folder.join("base"), vec![7; 1 << 20]).unwrap();
    }

    make("base", "raw");

    let seen = inspect(&top, Format::Qcow2, &allowed).unwrap();
    let paths: Vec<_> = seen.layers.iter().map(|layer| layer.path.clone()).collect();
    assert_eq!(paths, [top.canonicalize().unwrap(), inside.join("base").canonicalize().unwrap()]);
    let arguments = ["map".into(), "--output=json".into(), tool::named(&seen.graph())];
    let limits = tool::Limits::LOOK;
    let map = tool::succeed("qemu-img", "map it", &arguments, &limits, None).await.unwrap();
    assert!(String::from_utf8(map).unwrap().contains("\"depth\": 1"));
    assert!(matches!(refusal(&top, &Policy::default()), InspectError::Backing { .. }));

    std::os::unix::fs::symlink(outside.join("base"), inside.join("link")).unwrap();
    let outside = outside.join("base").display().to_string();
    let names = ["link", "../outside/base", &outside, "/etc/passwd", "missing", "nbd://host/a"];
    for name in names.into_iter().chain(["json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}"])
    {
        make(name, "raw");
        let refused = refusal(&top, &allowed);
        assert!(matches!(refused, InspectError::Backing { .. }), "{name}: {refused}");
    }
    make("base", "vmdk");
    assert!(matches!(refusal(&top, &allowed), InspectError::Backing { .. }), "its format counts");
    let own = top.file_name().unwrap().to_str().unwrap();
    make(&format!("./{own}"), "qcow2");
    assert!(matches!(refusal(&top, &allowed), InspectError::ChainTooLong { .. }), "a loop");
}

#[test]
fn s01_nothing_is_read_from_a_raw_image() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    fs::write(&path, [&b"QFI\xfb"[..], &[0; 508]].concat()).unwrap();

    let seen = inspect(&path, Format::Raw, &Policy::default()).unwrap();

    assert_eq!((seen.size, seen.stored, &seen.header), (512, 512, &None));
    let file = json!({"driver": "file", "filename": path.canonicalize().unwrap()});
    assert_eq!(seen.graph(), json!({"driver": "raw", "file": file, "read-only": true}));
}

#[test]
fn s03_a_copy_takes_what_an_image_can_hold_and_not_what_it_shows() {
    let seen = |size, stored| Inspected { layers: Vec::new(), size, stored, header: None };
    let bomb = seen(64 << 40, 256 << 10).bounds();
    assert_eq!((bomb.data, bomb.file_len), (1 << 30, 5 << 20));
    let plain = seen(1 << 30, 1 << 30).bounds();
    assert_eq!(plain, Bounds::of_disk(1 << 30));
    assert_eq!(seen(u64::MAX, u64::MAX).bounds().data, u64::MAX);
}

#[test]
fn what_is_no_file_and_what_is_empty_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("empty");
    fs::write(&path, "").unwrap();
    let empty = inspect(&path, Format::Raw, &Policy::default());
    assert!(matches!(empty, Err(ImageError::Refused { source: InspectError::Empty, .. })));
    assert_eq!(refusal(&path, &Policy::default()), InspectError::Truncated);
    for path in [folder.path(), Path::new("/dev/null")] {
        let refused = inspect(path, Format::Raw, &Policy::default());
        assert!(matches!(refused, Err(ImageError::NoFile { .. })), "{refused:?}");
    }
}
