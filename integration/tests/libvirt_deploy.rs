//! `kvmsnap image deploy`: an image becomes a machine of libvirt.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use integration::faults::{Fault, assert_says};
use integration::images::{content, line, names};
use integration::libvirt::Scene;
use integration::restored::text;
use integration::{Outcome, finish, spawn};
use serde_json::json;
use vm_fixtures::libvirt::Libvirt;
use vm_fixtures::{Disk, Guest, MIB};

const SIZE: u64 = 4 * MIB;
const DISKS: [&str; 2] = ["vda", "vdb"];

/// A machine with UEFI and two disks, and the image that was kept of it.
struct Lost {
    scene: Scene,
    image: PathBuf,
    mac: &'static str,
}

impl Lost {
    fn new(libvirt: &Libvirt, mac: &'static str) -> Self {
        let plan = Guest::without_os().disk(Disk::new("vda", SIZE)).disk(Disk::new("vdb", SIZE));
        let network = format!("<interface type='user'><mac address='{mac}'/></interface>");
        let plan = plan.under_libvirt().uefi().devices_xml(&network);
        let scene = Scene::of(plan, &DISKS, SIZE, libvirt);
        fs::write(scene.domain.folder().join("nvram.fd"), [7; 540_672]).expect("a folder of ours");
        let store = scene.host.folder().join("store");
        let mut command = scene.host.command(["image", "get", "--json", "--into"]);
        command.arg(&store).arg(scene.domain.name());
        let outcome = finish(spawn(command));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let image = PathBuf::from(text(&line(&outcome.stdout), "folder"));
        Self { scene, image, mac }
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = self.scene.host.command(["image", "deploy"]);
        command.arg(&self.image).args(more);
        command
    }

    fn deploy(&self, more: &[&str]) -> Outcome {
        finish(spawn(self.command(more)))
    }

    /// The disks in a folder are those that were kept.
    #[track_caller]
    fn assert_whole(&self, folder: &Path) {
        for disk in DISKS {
            let holds = content(&self.scene.host, folder, disk);
            assert!(holds == self.scene.contents.of(disk), "{disk} is not as it was");
        }
    }

    /// Those of them that have their names are.
    #[track_caller]
    fn assert_named_ones_whole(&self, folder: &Path) {
        for disk in DISKS {
            if folder.join(format!("{disk}.qcow2")).exists() {
                let holds = content(&self.scene.host, folder, disk);
                assert!(holds == self.scene.contents.of(disk), "{disk} is half written");
            }
        }
    }
}

/// A machine whose host is gone comes back by its image alone, in its old place and as itself.
#[test]
fn a_lost_machine_comes_back_where_it_was_and_as_itself() {
    let Some(libvirt) = Libvirt::start() else { return };
    let lost = Lost::new(&libvirt, "52:54:00:65:43:01");
    let (domain, folder) = (&lost.scene.domain, lost.scene.domain.folder());
    let uuid = domain.uuid();
    domain.virsh("undefine", &["--nvram"]);
    for disk in DISKS {
        fs::remove_file(folder.join(format!("{disk}.qcow2"))).expect("its image");
    }
    let before = names(folder);

    let planned = lost.deploy(&["--keep-identity", "--dry-run"]);

    assert_eq!(planned.code, Some(0), "{planned:?}");
    let vda = folder.join("vda.qcow2");
    assert!(planned.stdout.contains(&format!("disk vda: {}", vda.display())), "{planned:?}");
    assert_eq!(names(folder), before);
    assert!(libvirt.try_virsh(&["domuuid", domain.name()]).is_err());

    let deployed = lost.deploy(&["--keep-identity", "--start"]);

    assert_eq!(deployed.code, Some(0), "{deployed:?}");
    assert_eq!((domain.uuid(), domain.state().as_str()), (uuid, "running"));
    assert!(domain.xml().contains(lost.mac), "{}", domain.xml());
    assert_eq!(domain.disk_path("vda"), vda);
    domain.destroy();
    lost.assert_whole(folder);
    let partial = names(folder).into_iter().find(|name| name.ends_with(".partial"));
    assert_eq!(partial, None);
}

/// Beside the machine that it came from it is another one, and nothing of that one is touched.
#[test]
fn p5_a_second_machine_gets_its_own_identity_and_writes_over_nothing() {
    let Some(libvirt) = Libvirt::start() else { return };
    let lost = Lost::new(&libvirt, "52:54:00:65:43:02");
    let domain = &lost.scene.domain;
    let (folder, name) = (domain.folder(), format!("{}-2", domain.name()));
    let new = folder.join("new");
    let new_text = new.to_str().expect("a plain path");
    let before = names(folder);

    assert_says(&lost.deploy(&[]), 1, "--name gives it another one");
    assert_says(&lost.deploy(&["--name", &name]), 1, "vda.qcow2 exists already");
    let twin = lost.deploy(&["--name", &name, "--keep-identity", "--to", new_text]);
    assert_says(&twin, 1, "has the uuid");
    assert_eq!(names(folder), before);
    let deployed = lost.deploy(&["--name", &name, "--to", new_text]);
    assert_eq!(deployed.code, Some(0), "{deployed:?}");

    let other = libvirt.virsh(&["dumpxml", &name]);
    assert!(other.contains(&format!("{new_text}/vda.qcow2")), "{other}");
    assert!(!other.contains(&domain.uuid()) && !other.contains(lost.mac), "{other}");
    lost.assert_whole(&new);
    let variables = fs::read(new.join(format!("{name}_VARS.fd"))).expect("its variables");
    assert!(variables == [7; 540_672], "they are not as they were");
}

/// R01, P5: wherever it is killed or fails, no half disk has a name, and the same command then finishes; where it
/// cannot know whose the disks are that it finds, it names them.
#[test]
fn r01_p5_killed_or_failing_at_each_effect_a_deployment_is_finished_by_the_next() {
    let Some(libvirt) = Libvirt::start() else { return };
    let lost = Lost::new(&libvirt, "52:54:00:65:43:06");
    let (folder, name) = (lost.scene.domain.folder(), lost.scene.domain.name().to_owned());
    let first = format!("{name}-first");
    let to = folder.join("first");
    let command = lost.command(&["--name", &first, "--to", to.to_str().expect("plain")]);
    let effects = lost.scene.host.golden_effects("image deploy", command);
    for (n, effect) in effects.iter().enumerate() {
        let fault = if n % 2 == 0 { Fault::Crash } else { Fault::FailOnce };
        let case = format!("{fault:?} at {n}, {effect}");
        let (name, to) = (format!("{name}-{n}"), folder.join(n.to_string()));
        let arguments = ["--name", &name, "--to", to.to_str().expect("plain")];

        let outcome = finish(spawn(fault.at(n + 1, lost.command(&arguments))));

        assert_ne!(outcome.code, Some(0), "{case}: {outcome:?}");
        let is_partial = |name: &String| name.ends_with(".partial");
        let found = if to.exists() { names(&to) } else { Vec::new() };
        let is_named = found.iter().any(|name| !is_partial(name));
        lost.assert_named_ones_whole(&to);
        // Who is killed leaves a second name for what is its own; whoever fails leaves it to the user.
        if is_named && fault != Fault::Crash {
            let again = lost.deploy(&arguments);
            assert_says(&again, 1, "exists already");
            assert_says(&again, 1, "an interrupted one left");
            assert!(libvirt.try_virsh(&["domuuid", &name]).is_err(), "{case}");
            fs::remove_dir_all(&to).expect("a folder of ours");
        }
        let again = lost.deploy(&arguments);
        assert_eq!(again.code, Some(0), "{case}: {again:?}");
        assert!(names(&to).iter().all(|name| !is_partial(name)), "{case}: {:?}", names(&to));
        lost.assert_whole(&to);
    }
}

/// A description that was adapted by hand is taken in place of the image's.
#[test]
fn a_description_can_be_given_beside_the_image() {
    let Some(libvirt) = Libvirt::start() else { return };
    let lost = Lost::new(&libvirt, "52:54:00:65:43:05");
    let folder = lost.scene.domain.folder();
    let name = format!("{}-adapted", lost.scene.domain.name());
    let adapted = lost.scene.domain.xml().replace("<vcpu placement='static'>1<", "<vcpu>3<");
    let path = folder.join("adapted.xml");
    fs::write(&path, &adapted).expect("a folder of ours");
    let (xml, to) = (path.to_str().expect("plain"), folder.join("new"));

    let to = to.to_str().expect("plain");
    let deployed = lost.deploy(&["--name", &name, "--xml", xml, "--to", to]);

    assert_eq!(deployed.code, Some(0), "{deployed:?}");
    let other = libvirt.virsh(&["dumpxml", &name]);
    assert!(other.contains(">3</vcpu>"), "{other}");
}

/// What was made from a template is called as it is, not as the template's machine.
#[test]
fn a_machine_made_from_a_template_has_its_own_name() {
    let Some(libvirt) = Libvirt::start() else { return };
    let lost = Lost::new(&libvirt, "52:54:00:65:43:03");
    let name = format!("{}-made", lost.scene.domain.name());
    let path = lost.image.join("image.json");
    let mut record = line(&fs::read_to_string(&path).expect("a record"));
    record["machine"] = json!(name);
    record["origin"] = json!({"update": {"template": "/srv/web", "tree": "/srv/shop"}});
    fs::write(&path, record.to_string()).expect("a folder of ours");

    let planned = lost.deploy(&["--dry-run", "--to", "/var/lib/libvirt/images/made"]);

    assert_eq!(planned.code, Some(0), "{planned:?}");
    assert!(planned.stdout.contains(&format!("domain: {name}, with the new uuid")), "{planned:?}");
}

/// An image that is not what its record says becomes no machine.
#[test]
fn p5_a_damaged_image_becomes_no_machine() {
    let Some(libvirt) = Libvirt::start() else { return };
    let lost = Lost::new(&libvirt, "52:54:00:65:43:04");
    let (folder, name) = (lost.scene.domain.folder(), format!("{}-2", lost.scene.domain.name()));
    let image = File::options().write(true).open(lost.image.join("vdb.qcow2")).expect("its image");
    image.write_all_at(&[0xA5], 70_000).expect("our file");
    let new = folder.join("new");

    let refused = lost.deploy(&["--name", &name, "--to", new.to_str().expect("plain")]);

    assert_says(&refused, 1, "vdb.qcow2 is damaged");
    assert!(names(&new).is_empty(), "{:?}", names(&new));
    assert!(libvirt.try_virsh(&["domuuid", &name]).is_err());
}
