//! A root by UUID or label becomes the device of this very disk.

use proptest::prelude::*;

use super::super::root::{mbr_uuid, replace};
use super::*;

/// A boot partition whose entry has this root; each filesystem that may be one beside it.
fn parts(root: &str) -> Vec<Vec<u8>> {
    let entry = format!("title x\nlinux /k\noptions quiet root={root} ro rootflags=subvol=@\n");
    let boot = Ext4Image::new()
        .uuid(images::BOOT_UUID)
        .file("loader/entries/a.conf", entry.as_bytes())
        .file("k", b"kernel");
    let mut xfs = vec![0; 4096];
    xfs[..4].copy_from_slice(b"XFSB");
    xfs[32..48].fill(0xaa);
    xfs[108..113].copy_from_slice(b"xroot");
    let mut btrfs = vec![0; 0x2_0000];
    btrfs[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
    btrfs[0x1_0020..0x1_0030].fill(0xbb);
    btrfs[0x1_012b..0x1_0134].copy_from_slice(b"two words");
    let mut old = ext4(&Ext4Image::new());
    old[1024 + 0x78..1024 + 0x84].copy_from_slice(b"cloudimg-roo");
    vec![ext4(&boot), xfs, btrfs, old, vfat(2, &[("x", b"x")])]
}

fn line(disk: &[u8], device: &str) -> Result<String, String> {
    let found = find(Box::new(disk.to_vec()), LIMITS, "console=ttyS0", Some(device));
    found.map(|boot| boot.command_line).map_err(|error| error.to_string())
}

/// Every filesystem is found by both names, in whatever case a UUID is written.
#[test]
fn a_root_by_name_is_found_on_the_disk() {
    let vfat_uuid = "UUID=1234-abcd";
    for (root, number) in [
        (format!("UUID={}", images::BOOT_UUID), 1),
        ("UUID=AAAAAAAA-aaaa-aaaa-aaaa-aaaaaaaaaaaa".into(), 2),
        ("LABEL=xroot".into(), 2),
        ("UUID=bbbbbbbb-bbbb-bbbb-bbbb-bbbbbbbbbbbb".into(), 3),
        ("\"LABEL=two words\"".into(), 3),
        (format!("UUID={ROOT_UUID}"), 4),
        ("LABEL=cloudimg-roo".into(), 4),
        (vfat_uuid.into(), 5),
    ] {
        let wanted = format!("quiet root=/dev/vdc{number} ro rootflags=subvol=@ console=ttyS0");
        assert_eq!(line(&gpt(&parts(&root)), "vdc"), Ok(wanted), "{root}");
    }
    // Devices are what they are.
    let kept = "quiet root=/dev/sda1 ro rootflags=subvol=@ console=ttyS0";
    assert_eq!(line(&gpt(&parts("/dev/sda1")), "vda").unwrap(), kept);
}

/// By the table: a GPT has UUIDs and names, an MBR a signature and numbers, logical ones too.
#[test]
fn a_root_by_its_partition_is_found_in_the_table() {
    let names = |disk: &mut Vec<u8>| {
        let entry = 2 * 512 + 128;
        disk[entry + 16..entry + 32]
            .copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9, 9]);
        disk[entry + 56..entry + 64].copy_from_slice(b"r\0o\0\xf6\0t\0");
        images::mend_gpt(disk);
    };
    for root in ["PARTUUID=04030201-0605-0807-0909-090909090909", "PARTLABEL=roöt"] {
        let mut disk = gpt(&parts(root));
        names(&mut disk);
        let wanted = "quiet root=/dev/vda2 ro rootflags=subvol=@ console=ttyS0";
        assert_eq!(line(&disk, "vda").unwrap(), wanted);
    }
    for (number, mbr_number) in [(1, "01"), (6, "06")] {
        let mut disk = mbr(&parts(&format!("PARTUUID=DEADBEEF-{mbr_number}")));
        disk[440..444].copy_from_slice(&0xdead_beef_u32.to_le_bytes());
        assert!(line(&disk, "vda").unwrap().contains(&format!("root=/dev/vda{number} ")));
    }
    assert_eq!(mbr_uuid(0xab, 11), "000000ab-0b");
}

/// A disk without partitions is itself the root, also by Debian's links, which have no entry.
#[test]
fn a_disk_without_partitions_is_the_root() {
    let image = Ext4Image::new().file("vmlinuz", b"kernel");
    assert_eq!(line(&ext4(&image), "vda").unwrap(), "root=/dev/vda ro console=ttyS0");
}

/// Another disk's root would be the domain's own system, perhaps: that is not booted.
#[test]
fn a_root_that_is_elsewhere_is_refused() {
    for root in [
        "UUID=ffffffff-ffff-ffff-ffff-ffffffffffff",
        "LABEL=",
        "PARTUUID=ffffffff-01",
        "PARTLABEL=nothing",
    ] {
        let refused = line(&gpt(&parts(root)), "vda").unwrap_err();
        let wanted = format!("boot entry 'x' has its root at {root}, which is not on this disk");
        assert_eq!(refused, wanted);
    }
}

proptest! {
    /// Whatever the line: nothing but roots by name changes, and none of these is left.
    #[test]
    fn no_line_panics(line in "(root=|UUID=|LABEL=|PARTLABEL=|x|\"| |\t|=|é|/dev/vda1){0,30}") {
        let disk = Window::whole(Box::new(vec![0; 8192]));
        if let Ok(replaced) = replace("x", &line, &disk, None, "vda") {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let same: Vec<&str> = replaced.split_ascii_whitespace().collect();
            prop_assert_eq!(words, same);
        }
    }

    /// Any bytes as a disk.
    #[test]
    fn no_superblock_panics(
        bytes in prop::collection::vec(any::<u8>(), 0..2048),
        magic in 0..3usize,
        length in 0..0x1_0400usize,
    ) {
        let mut disk = vec![0; 0x1_0400];
        disk[1024..1024 + bytes.len()].copy_from_slice(&bytes);
        let (at, bytes) = [(1024 + 0x38, &b"\x53\xef"[..]), (0, b"XFSB"), (0x1_0040, b"_BHRfS_M")][magic];
        disk[at..at + bytes.len()].copy_from_slice(bytes);
        disk.truncate(length);
        let disk = Window::whole(Box::new(disk));
        let _ = replace("x", "root=LABEL=y", &disk, None, "vda");
        let part = partitions::Partition {
            number: 7, start: 512, length: u64::MAX, uuid: "u".into(), label: "l".into(),
        };
        let number = replace("x", "root=PARTLABEL=l", &disk, Some(&[part]), "vda");
        prop_assert_eq!(number.unwrap(), "root=/dev/vda7");
    }
}
