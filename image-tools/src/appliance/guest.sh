#!/bin/sh
# Runs inside the appliance, one step a call. What it prints goes to the host, which trusts none of it.
set -eu
step=$1
shift

# Mounts a file system to look at it: replays its journal, changes nothing else.
mount_of() { # DEVICE KIND OPTIONS AT
    case $2 in
    vfat) options=$3,quiet ;;
    *) options=$3 ;;
    esac
    mkdir -p "$4"
    mount -t "$2" -o "$options" "$1" "$4"
}

# The machine's own programs are run in its files, with nothing of the appliance's environment: its LVM keeps
# its notes in /tmp/lvm.
enter_guest() {
    for folder in dev proc sys; do mount --rbind "/$folder" "/sysroot/$folder"; done
    mkdir -p /sysroot/run
    mount -t tmpfs tmpfs /sysroot/run
}
in_guest() { chroot /sysroot /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C "$@" < /dev/null; }
has() { in_guest sh -c "command -v $1" > /dev/null 2>&1; }
leave_guest() {
    umount -R /sysroot/run
    for folder in sys proc dev; do umount -R "/sysroot/$folder"; done
}

# What a kernel has to find its root with, and its initramfs has not: modules, and LVM's program.
lacking() { # FOLDER-OF-ITS-MODULES LIST-OF-FILES ROOT-KIND lvm|plain
    case $3 in
    ext*) wanted=ext4 ;;
    *) wanted=$3 ;;
    esac
    [ "$4" != lvm ] || wanted="$wanted dm_mod"
    for module in virtio_pci virtio_blk virtio_scsi sd_mod ahci $wanted; do
        file="/$(echo "$module" | sed 's/_/[-_]/g')\\.ko"
        ! grep -q "$file" "$1/modules.builtin" 2> /dev/null || continue
        grep -q "^[^:]*$file[^:]*:" "$1/modules.dep" || continue
        grep -q "$file" "$2" || echo "$module"
    done
    [ "$4" != lvm ] || grep -Eq '/s?bin/lvm$' "$2" || echo lvm
}

# An initramfs for any machine of its kind, in /tmp/initramfs/made.
make_initramfs() { # TOOL VERSION
    rm -f /tmp/initramfs/made
    case $1 in
    mkinitramfs)
        rm -rf /tmp/initramfs/conf
        cp -a /sysroot/etc/initramfs-tools /tmp/initramfs/conf
        mkdir -p /tmp/initramfs/conf/conf.d
        printf "MODULES=most\nCOMPRESSLEVEL=1\n" > /tmp/initramfs/conf/conf.d/zz-kvmsnap
        in_guest TMPDIR=/run/kvmsnap mkinitramfs -d /run/kvmsnap/conf -o /run/kvmsnap/made "$2"
        ;;
    dracut) in_guest dracut --force --no-hostonly --tmpdir /run/kvmsnap --kver "$2" /run/kvmsnap/made ;;
    esac > /tmp/out 2>&1 && [ -s /tmp/initramfs/made ]
}

# Puts it in place of the one that the tree has, which stays beside it.
replace_initramfs() { # IMAGE
    chmod --reference="$1" /tmp/initramfs/made
    chown --reference="$1" /tmp/initramfs/made
    mv "$1" "$1.kvmsnap-before"
    cp -p /tmp/initramfs/made "$1" 2> /tmp/out || { rm -f "$1"; mv "$1.kvmsnap-before" "$1"; return 1; }
}

# Tells how one initramfs is, and makes it anew where it must be: WORD and DETAIL, behind a tab.
fit_initramfs() { # IMAGE FOLDER-OF-ITS-MODULES ROOT-KIND lvm|plain
    made=$1.kvmsnap-made
    if [ -e "$made" ]; then
        mv "$1" "$1.kvmsnap-before"
        mv "$made" "$1"
        printf 'kept\t\n'
        return
    fi
    if [ -z "$lister" ]; then
        printf 'unknown\tthe tree has neither lsinitramfs nor lsinitrd to look into it\n'
        return
    fi
    rm -f /tmp/initramfs/list
    in_guest TMPDIR=/run/kvmsnap "$lister" "${1#/sysroot}" > /tmp/initramfs/list 2> /tmp/out || true
    lacks=$(lacking "$2" /tmp/initramfs/list "$3" "$4" | tr '\n' ' ')
    if [ -z "$lacks" ]; then
        printf 'fits\t\n'
    elif [ -z "$maker" ]; then
        printf 'unfit\t%s; the tree has neither mkinitramfs nor dracut to make another\n' "$lacks"
    elif ! make_initramfs "$maker" "${2##*/}"; then
        printf 'unfit\t%s; %s failed: %s\n' "$lacks" "$maker" "$(tail -n 3 /tmp/out | tr '\n\t' '  ')"
    elif ! replace_initramfs "$1"; then
        printf 'unfit\t%s; there is no room for another in /boot\n' "$lacks"
    else
        in_guest TMPDIR=/run/kvmsnap "$lister" "${1#/sysroot}" > /tmp/initramfs/list 2> /tmp/out || true
        still=$(lacking "$2" /tmp/initramfs/list "$3" "$4" | tr '\n' ' ')
        printf 'made\t%s\t%s\t%s\n' "$lacks" "$maker" "$still"
    fi
}

case $step in
layout)
    udevadm settle
    lsblk --json --bytes --paths --output \
        NAME,TYPE,SIZE,HCTL,START,PTTYPE,PARTTYPE,PARTUUID,PARTLABEL,FSTYPE,UUID,LABEL
    ;;
volumes)
    lvm lvs --reportformat json --units b --nosuffix --options vg_name,lv_name,lv_size,lv_dm_path,vg_uuid,lv_uuid 2> /dev/null
    ;;
check) # DEVICE KIND: a file system that was in use is made whole
    case $2 in
    ext2 | ext3 | ext4)
        # 1: something was corrected.
        e2fsck -f -y "$1" > /tmp/out 2>&1 || [ $? -eq 1 ] || { cat /tmp/out >&2; exit 1; }
        ;;
    xfs)
        mount_of "$1" xfs defaults /tmp/replay
        umount /tmp/replay
        xfs_repair -n "$1" > /tmp/out 2>&1 || { tail -n 20 /tmp/out >&2; exit 1; }
        ;;
    btrfs)
        mount_of "$1" btrfs defaults /tmp/replay
        umount /tmp/replay
        btrfs check --readonly "$1" > /tmp/out 2>&1 || { tail -n 20 /tmp/out >&2; exit 1; }
        ;;
    vfat)
        # 1: something was corrected.
        fsck.vfat -a "$1" > /tmp/out 2>&1 || [ $? -eq 1 ] || { cat /tmp/out >&2; exit 1; }
        ;;
    esac
    ;;
verify) # DEVICE KIND: what is wrong with a file system, but for what any mount would put right
    case $2 in
    vfat)
        # Linux marks one as in use at 65 in FAT32, at 37 in the others, and never takes an older mark away.
        at=37
        [ "$(dd if="$1" bs=1 skip=22 count=2 2> /dev/null | od -An -tu2 | tr -d ' ')" != 0 ] || at=65
        printf '\000' | dd of="$1" bs=1 seek=$at conv=notrunc 2> /dev/null
        checker="fsck.vfat -n"
        ;;
    *)
        mount_of "$1" "$2" defaults /tmp/replay
        umount /tmp/replay
        case $2 in
        xfs) checker="xfs_repair -n" ;;
        btrfs) checker="btrfs check --readonly" ;;
        *) checker="e2fsck -f -n" ;;
        esac
        ;;
    esac
    $checker "$1" > /tmp/out 2>&1 || { tail -n 20 /tmp/out >&2; exit 1; }
    ;;
table) # DEVICE KIND: the fstab on it
    at=/tmp/look
    # A btrfs has its system in the subvolume that is mounted unless another is asked for, or in one of a
    # well-known name.
    roots=ro
    [ "$2" != btrfs ] || roots="ro ro,subvolid=5"
    for options in $roots; do
        mount_of "$1" "$2" "$options" "$at"
        for folder in . @ @rootfs root; do
            if [ -f "$at/$folder/etc/fstab" ]; then
                head -c 65536 "$at/$folder/etc/fstab"
                umount "$at"
                exit 0
            fi
            [ "$2" = btrfs ] || break
        done
        umount "$at"
    done
    ;;
identify) # DEVICE KIND uuid|label|partuuid VALUE
    case $3/$2 in
    uuid/ext*) tune2fs -f -U "$4" "$1" < /dev/null ;;
    uuid/xfs) xfs_admin -U "$4" "$1" ;;
    uuid/btrfs) btrfstune -f -U "$4" "$1" ;;
    uuid/vfat) fatlabel -i "$1" "$(echo "$4" | tr -d -)" ;;
    uuid/swap) swaplabel -U "$4" "$1" ;;
    label/ext*) e2label "$1" "$4" ;;
    label/xfs) xfs_admin -L "$4" "$1" ;;
    label/btrfs) btrfs filesystem label "$1" "$4" ;;
    label/vfat) fatlabel "$1" "$4" ;;
    label/swap) swaplabel -L "$4" "$1" ;;
    partuuid/*)
        number=$(echo "$1" | sed 's/.*[^0-9]//')
        disk=${1%"$number"}
        case $4 in
        ????????-??) sfdisk --disk-id "$disk" "0x${4%-*}" ;;
        *) sfdisk --part-uuid "$disk" "$number" "$4" ;;
        esac
        ;;
    *)
        echo "a $2 file system cannot be given a $3" >&2
        exit 1
        ;;
    esac > /dev/null
    udevadm settle
    ;;
mount) # DEVICE KIND OPTIONS PATH: tells where times have no parts of a second
    options=${3:-defaults}
    mount_of "$1" "$2" "$options" "/sysroot$4"
    case $2 in
    ext*) ! dumpe2fs -h "$1" 2> /dev/null | grep -Eq '^Inode size:\s+128$' || echo whole seconds ;;
    esac
    ;;
tree-files) # SOURCE OPTIONS: fetches the few files that say how the tree's machine is laid out
    source=$1
    shift
    mkdir -p /tmp/tree
    rsync "$@" --blocking-io --rsh=/tmp/kvmsnap-port "$source" /tmp/tree/ > /dev/null
    owner=$(stat -c %u /tmp/tree/etc /tmp/tree/etc/fstab 2> /dev/null | sort -u | tr '\n' ' ')
    if [ -n "$owner" ] && [ "$owner" != "0 " ]; then
        echo "the tree's etc belongs to user $owner: its files have lost their owners" >&2
        exit 1
    fi
    ;;
tree-file) # FILE: one of them
    [ ! -f "/tmp/tree/$1" ] || head -c 1048576 "/tmp/tree/$1"
    ;;
pull) # SOURCE OPTIONS: the machine's files become those of the tree
    source=$1
    shift
    {
        status=0
        rsync "$@" --blocking-io --rsh=/tmp/kvmsnap-port "$source" /sysroot/ || status=$?
        echo kvmsnap-end
    } > /dev/virtio-ports/kvmsnap.log
    exit $status
    ;;
places) # what a system needs to start, where the tree has left it out
    for folder in proc sys dev run; do
        [ -d "/sysroot/$folder" ] || mkdir -m 755 "/sysroot/$folder"
    done
    [ -d /sysroot/tmp ] || mkdir -m 1777 /sysroot/tmp
    ;;
initramfs-aside) # puts those that a tree has back in place of those that an update has made; tells which
    for before in /sysroot/boot/*.kvmsnap-before; do
        [ -f "$before" ] || continue
        image=${before%.kvmsnap-before}
        [ ! -e "$image" ] || mv "$image" "$image.kvmsnap-made"
        mv "$before" "$image"
        echo "${image#/sysroot/}"
    done
    # Who writes to one afterwards changes this.
    stat -c '%n %i %s %Y %Z' /sysroot/boot/init* > /tmp/initramfs-aside 2> /dev/null || true
    ;;
initramfs) # same|other ROOT-KIND lvm|plain: has each kernel find the disks of a virtual machine; a line for each
    enter_guest
    # The appliance's own disk has room: the machine's may not.
    mkdir -p /tmp/initramfs /sysroot/run/kvmsnap
    mount --bind /tmp/initramfs /sysroot/run/kvmsnap
    lister= maker=
    for name in lsinitrd lsinitramfs; do ! has $name || lister=$name; done
    for name in mkinitramfs dracut; do ! has $name || maker=$name; done
    for notes in /sysroot/lib/modules/*/modules.dep; do
        [ -f "$notes" ] || continue
        folder=${notes%/*}
        version=${folder##*/}
        for name in "initrd.img-$version" "initramfs-$version.img" "initrd-$version"; do
            image=/sysroot/boot/$name
            [ -f "$image" ] && [ ! -L "$image" ] || continue
            is_as_before=$(grep -Fx "$(stat -c '%n %i %s %Y %Z' "$image")" /tmp/initramfs-aside || true)
            if [ "$1" != same ] || [ -z "$is_as_before" ]; then
                rm -f "$image.kvmsnap-made"
            elif [ ! -e "$image.kvmsnap-made" ]; then
                continue
            fi
            printf '%s\t' "$version"
            fit_initramfs "$image" "$folder" "$2" "$3"
        done
    done
    # What systemd-boot starts: kernels with their initramfs in one file, and initramfs in folders of their own.
    for boot in boot boot/efi efi; do
        for image in /sysroot/$boot/EFI/Linux/*.efi /sysroot/$boot/*/*/initrd*; do
            [ ! -f "$image" ] ||
                printf '%s\tunknown\tsystemd-boot starts it, which is not looked into\n' "${image#/sysroot/}"
        done
    done
    rm -rf /sysroot/boot/*.kvmsnap-made /tmp/initramfs/*
    leave_guest
    ;;
relabel)
    : > /sysroot/.autorelabel
    ;;
boot-loader) # bios|uefi DISK ESP: has it start from these disks; tells what was done
    enter_guest
    installer=
    for name in grub-install grub2-install; do
        [ -n "$installer" ] || ! has $name || installer=$name
    done
    rm -f /tmp/out
    status=0
    done=absent
    case $1 in
    bios)
        if [ -n "$installer" ] && [ -d /sysroot/usr/lib/grub/i386-pc ]; then
            in_guest $installer --target=i386-pc --recheck "$2" > /tmp/out 2>&1 || status=$?
            done="$installer was run"
        fi
        ;;
    uefi)
        # Red Hat's refuses to be used for UEFI: the programs that its packages have put there do.
        if [ -n "$installer" ] && [ -d /sysroot/usr/lib/grub/x86_64-efi ] &&
            in_guest $installer --target=x86_64-efi --efi-directory="$3" --no-nvram --removable > /tmp/out 2>&1; then
            done="$installer was run"
        elif [ -e "/sysroot$3/EFI/BOOT/BOOTX64.EFI" ] || [ -e "/sysroot$3/EFI/BOOT/bootx64.efi" ]; then
            done="the EFI system partition has a boot loader"
        else
            for program in "/sysroot$3"/EFI/*/shimx64.efi "/sysroot$3"/EFI/*/grubx64.efi; do
                [ -e "$program" ] || continue
                mkdir -p "/sysroot$3/EFI/BOOT"
                cp "${program%/*}"/*.efi "/sysroot$3/EFI/BOOT/"
                cp "$program" "/sysroot$3/EFI/BOOT/BOOTX64.EFI"
                done="its boot loader was copied to EFI/BOOT"
                break
            done
        fi
        ;;
    esac
    leave_guest
    [ $status -eq 0 ] || { tail -n 20 /tmp/out >&2; exit 1; }
    echo "$done"
    ;;
finish)
    sync
    ! grep -q ' /sysroot ' /proc/mounts || umount -R /sysroot
    lvm vgchange -an > /dev/null 2>&1 || true
    sync
    ;;
*)
    echo "there is no step $step" >&2
    exit 2
    ;;
esac
