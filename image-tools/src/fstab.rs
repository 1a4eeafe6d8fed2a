//! The table of file systems (`/etc/fstab`), as `fstab(5)` describes it. Without I/O.

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What is mounted, as it is written: `UUID=…`, `/dev/vg/root`, …
    pub spec: String,
    /// Where; `none` or `swap` for swap.
    pub path: String,
    /// `ext4`, `swap`, …
    pub kind: String,
    /// Separated by commas.
    pub options: String,
}

impl Entry {
    /// Whether it is swap.
    pub fn is_swap(&self) -> bool {
        self.kind == "swap"
    }

    /// Whether it names a disk's file system or swap: not a network, not memory, not a bind mount.
    pub fn is_on_disk(&self) -> bool {
        let is_named = self
            .spec
            .split_once('=')
            .is_some_and(|(key, _)| ["UUID", "LABEL", "PARTUUID", "PARTLABEL"].contains(&key));
        let is_removable = ["/dev/cdrom", "/dev/sr", "/dev/fd"];
        let is_device = self.spec.starts_with("/dev/")
            && !is_removable.iter().any(|prefix| self.spec.starts_with(prefix));
        let is_bind = self.options().any(|option| option == "bind" || option == "rbind");
        (is_named || is_device) && !is_bind
    }

    /// Whether a machine starts also without it.
    pub fn may_be_absent(&self) -> bool {
        self.options().any(|option| option == "nofail" || option == "noauto")
    }

    /// Those options that decide which files are seen, and as whose: a btrfs subvolume, owners on vfat.
    pub fn deciding_options(&self) -> String {
        const DECIDING: [&str; 7] =
            ["subvol=", "subvolid=", "umask=", "fmask=", "dmask=", "uid=", "gid="];
        let decides = |option: &&str| DECIDING.iter().any(|prefix| option.starts_with(prefix));
        self.options().filter(decides).collect::<Vec<_>>().join(",")
    }

    fn options(&self) -> impl Iterator<Item = &str> {
        self.options.split(',')
    }
}

/// Reads a table. Lines that are none are passed over, as `mount` does.
pub fn parse(text: &str) -> Vec<Entry> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let entry = |line: &str| {
        let mut fields = line.split_ascii_whitespace().map(unescape);
        let (spec, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        let options = fields.next().unwrap_or_else(|| "defaults".to_owned());
        let spec = match spec.split_once('=') {
            Some((key, value)) => format!("{key}={}", value.trim_matches('"')),
            None => spec,
        };
        Some(Entry { spec, path, kind, options })
    };
    lines.filter_map(entry).collect()
}

/// Space, tab, line feed and backslash are written in octal: `\040`.
fn unescape(field: &str) -> String {
    let mut plain = String::with_capacity(field.len());
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        plain.push_str(before);
        let octal = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal.filter(u8::is_ascii) {
            Some(byte) => {
                plain.push(char::from(byte));
                rest = &after[3..];
            }
            None => {
                plain.push('\\');
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_table_of_debians_installer_is_read() {
        let table = "# /etc/fstab\n/dev/mapper/vg-root /  ext4 errors=remount-ro 0 1\n\
            UUID=\"ab-cd\"\t/srv/my\\040data xfs defaults,nofail 0 2\n\nLABEL=swap none swap sw\n\
            tmpfs /tmp tmpfs\n/srv /mnt none bind\n/dev/sr0 /media iso9660 noauto\nbroken\n";
        let entries = parse(table);
        assert_eq!(entries.len(), 6);
        assert_eq!((&*entries[1].spec, &*entries[1].path), ("UUID=ab-cd", "/srv/my data"));
        assert!(entries[1].may_be_absent() && !entries[0].may_be_absent());
        assert!(entries[2].is_swap());
        let on_disk: Vec<_> = entries.iter().map(Entry::is_on_disk).collect();
        assert_eq!(on_disk, [true, true, true, false, false, false]);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC*", raw in "[\\\\0-9a-f \t\n#=\"/é]*") {
            parse(&text);
            parse(&raw);
        }
    }
}
