//! The machines: two of one flavour that differ in everything else, and one that starts by UEFI.

/// One of the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Machine {
    /// BIOS, a volume group `vg0` with an ext4 root, XFS `/var` and swap.
    Bios,
    /// Of the same flavour, with other packages, users, names and UUIDs, and with files of every kind.
    BiosOther,
    /// UEFI, GPT with an EFI system partition, swap and a btrfs root.
    Uefi,
}

/// The UUIDs of a machine's file systems, as `blkid` tells them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Uuids {
    pub(super) root: &'static str,
    /// XFS, or the number of the vfat.
    pub(super) second: &'static str,
    pub(super) swap: &'static str,
}

impl Machine {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bios, Self::BiosOther, Self::Uefi];

    /// Its host name.
    pub fn hostname(self) -> &'static str {
        match self {
            Self::Bios => "alder",
            Self::BiosOther => "birch",
            Self::Uefi => "cedar",
        }
    }

    /// Whether it starts by UEFI.
    pub fn uefi(self) -> bool {
        self == Self::Uefi
    }

    /// The content of `/etc/machine-id`.
    pub fn machine_id(self) -> &'static str {
        match self {
            Self::Bios => "a1de4a1de4a1de4a1de4a1de4a1de4aa",
            Self::BiosOther => "b14c4b14c4b14c4b14c4b14c4b14c4bb",
            Self::Uefi => "ceda4ceda4ceda4ceda4ceda4ceda4cc",
        }
    }

    pub(super) fn uuids(self) -> Uuids {
        match self {
            Self::Bios => Uuids {
                root: "0a000000-0000-4000-8000-00000000000a",
                second: "0a000000-0000-4000-8000-00000000000b",
                swap: "0a000000-0000-4000-8000-00000000000c",
            },
            Self::BiosOther => Uuids {
                root: "0b000000-0000-4000-8000-00000000000a",
                second: "0b000000-0000-4000-8000-00000000000b",
                swap: "0b000000-0000-4000-8000-00000000000c",
            },
            Self::Uefi => Uuids {
                root: "0c000000-0000-4000-8000-00000000000a",
                second: "0C0D-0E0F",
                swap: "0c000000-0000-4000-8000-00000000000c",
            },
        }
    }

    /// Packages of the common base that it does without.
    pub(super) fn without(self) -> &'static [&'static str] {
        match self {
            Self::Bios => &["bc", "hello"],
            Self::BiosOther => &["ed"],
            Self::Uefi => &["ed", "hello"],
        }
    }

    /// Users with their numeric ids.
    pub(super) fn users(self) -> &'static [(&'static str, u32)] {
        match self {
            Self::Bios => &[("anna", 1000)],
            Self::BiosOther => &[("bert", 1000), ("anna", 1417)],
            Self::Uefi => &[("carl", 1000)],
        }
    }

    /// `/etc/fstab`.
    pub(super) fn fstab(self) -> String {
        let Uuids { root, second, swap } = self.uuids();
        let (kind, second_line) = match self.uefi() {
            false => ("ext4 errors=remount-ro 0 1", format!("UUID={second} /var xfs defaults 0 0")),
            true => ("btrfs defaults 0 0", format!("UUID={second} /boot/efi vfat umask=0077 0 1")),
        };
        format!("UUID={root} / {kind}\n{second_line}\nUUID={swap} none swap sw 0 0\n")
    }
}
