//! Files of every kind, in a tree of their own on each of two file systems.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, chown, lchown, symlink};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::fs::{XattrFlags, lsetxattr};

/// Where they are: below the root, and below `/var`.
const FOLDERS: [&str; 2] = ["srv/oddities", "var/lib/oddities"];

/// `struct vfs_cap_data` of version 2 (`linux/capability.h`): effective, `CAP_NET_RAW` permitted.
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An access control list (`linux/posix_acl_xattr.h`): version 2, then tag, rights and id of each entry.
/// The user 1417 may read.
fn access_list() -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, NOBODY), (2, 4, 1417), (4, 4, NOBODY), (0x10, 4, NOBODY), (0x20, 0, NOBODY)];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Adds them.
#[track_caller]
pub(super) fn add(tree: &Path) {
    for folder in FOLDERS {
        add_to(&tree.join(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
    }
    // Only here: what fills `/var` passes sockets over.
    let socket = tree.join(FOLDERS[0]).join("socket");
    let rights = Mode::from_bits_truncate(0o640);
    mknod(&socket, SFlag::S_IFSOCK, rights, 0).expect("the tree is ours");
}

fn add_to(folder: &Path) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let at = |name: &[u8]| folder.join(OsStr::from_bytes(name));

    for name in
        [&b"a name with  spaces "[..], b"new\nline", b"latin-1 \xe9t\xe9", b"-rf", b"*", b"\\"]
    {
        fs::write(at(name), name)?;
    }
    fs::write(at(&[b'n'; 255]), "the longest name")?;

    fs::write(at(b"linked"), "three names")?;
    fs::create_dir(at(b"folder"))?;
    for name in [&b"linked-2"[..], b"folder/linked-3"] {
        fs::hard_link(at(b"linked"), at(name))?;
    }
    symlink("linked", at(b"link"))?;
    symlink("/nowhere/at all", at(b"dangling"))?;
    symlink("../../../../../../etc/passwd", at(b"upwards"))?;
    lchown(at(b"dangling"), Some(1417), Some(4321))?;

    fs::write(at(b"owned by nobody here"), "")?;
    chown(at(b"owned by nobody here"), Some(54321), Some(65432))?;
    for (name, mode) in
        [("setuid", 0o4755), ("setgid", 0o2755), ("closed", 0o000), ("sticky", 0o1777)]
    {
        match name {
            "sticky" => fs::create_dir(at(name.as_bytes()))?,
            _ => fs::write(at(name.as_bytes()), name)?,
        }
        fs::set_permissions(at(name.as_bytes()), Permissions::from_mode(mode))?;
    }

    for name in [&b"attributes"[..], b"capable", b"listed"] {
        fs::write(at(name), name)?;
        fs::set_permissions(at(name), Permissions::from_mode(0o640))?;
    }
    let none = XattrFlags::empty();
    lsetxattr(at(b"attributes"), "user.colour", b"green \xff\0 bytes", none)?;
    lsetxattr(at(b"attributes"), "user.empty", b"", none)?;
    lsetxattr(at(b"folder"), "user.colour", b"of a folder", none)?;
    lsetxattr(at(b"capable"), "security.capability", &NET_RAW, none)?;
    lsetxattr(at(b"listed"), "system.posix_acl_access", &access_list(), none)?;
    lsetxattr(at(b"folder"), "system.posix_acl_default", &access_list(), none)?;

    let sparse = File::create(at(b"sparse"))?;
    sparse.write_all_at(b"begins", 0)?;
    sparse.write_all_at(b"in the middle", 8 << 20)?;
    sparse.set_len(64 << 20)?;

    let rights = Mode::from_bits_truncate(0o640);
    let nodes = [
        (&b"null"[..], SFlag::S_IFCHR, makedev(1, 3)),
        (b"disk", SFlag::S_IFBLK, makedev(252, 300)),
        (b"pipe", SFlag::S_IFIFO, 0),
    ];
    for (name, kind, device) in nodes {
        mknod(&at(name), kind, rights, device)?;
    }
    Ok(())
}
