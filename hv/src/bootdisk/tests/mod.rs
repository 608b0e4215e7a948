//! Disks as Debian, Ubuntu and Fedora lay them out, made here: ext4 by `mke2fs`, vfat by the
//! crate `fatfs`.

mod corrupt;
mod images;
mod root;
mod scripts;

use super::*;
use images::{Ext4Image, ROOT_UUID, ext4, gpt, mbr, vfat, with_journalled_write};

const LIMITS: Limits = Limits { kernel_bytes_max: 1 << 20, initrd_bytes_max: 1 << 20 };

fn boot(disk: &[u8]) -> Result<Boot, BootDiskError> {
    find(Box::new(disk.to_vec()), LIMITS, "console=ttyS0", None)
}

fn error(disk: &[u8]) -> String {
    boot(disk).map(|boot| boot.description).unwrap_err().to_string()
}

/// What `grub-mkconfig` writes on Debian 12, shortened where it only draws.
fn debian_grub_cfg(default: &str) -> String {
    include_str!("debian-grub.cfg").replace("@UUID@", ROOT_UUID).replace("@DEFAULT@", default)
}

fn debian_root() -> Ext4Image {
    Ext4Image::new()
        .file("boot/vmlinuz-6.1.0-40-cloud-amd64", b"kernel 40")
        .file("boot/initrd.img-6.1.0-40-cloud-amd64", b"initrd 40")
        .file("boot/vmlinuz-6.1.0-9-cloud-amd64", b"kernel 9")
        .file("boot/initrd.img-6.1.0-9-cloud-amd64", b"initrd 9")
        .file("boot/grub/grub.cfg", debian_grub_cfg("0").as_bytes())
        .file("boot/grub/grubenv", b"# GRUB Environment Block\n#####")
        .link("vmlinuz", "boot/vmlinuz-6.1.0-9-cloud-amd64")
        .link("initrd.img", "boot/initrd.img-6.1.0-9-cloud-amd64")
}

/// Debian's cloud image: root first, then the ESP, whose grub.cfg is but a pointer.
#[test]
fn debian_boots_by_its_grub_cfg() {
    let esp = vfat(16, &[("EFI/debian/grub.cfg", b"configfile $prefix/grub.cfg\n")]);
    let disk = gpt(&[ext4(&debian_root()), esp]);
    let boot = boot(&disk).unwrap();
    assert_eq!(boot.kernel, b"kernel 40");
    assert_eq!(boot.initrd.as_deref(), Some(&b"initrd 40"[..]));
    let command_line = format!("root=UUID={ROOT_UUID} ro console=tty0 quiet console=ttyS0");
    assert_eq!(boot.command_line, command_line);
    let text = "partition 1 (ext4), /boot/grub/grub.cfg, entry 'Debian GNU/Linux': \
                /boot/vmlinuz-6.1.0-40-cloud-amd64 on partition 1 (ext4)";
    assert_eq!(boot.description, text);
}

/// The default may be an id of a submenu and in it, a number, or what the environment remembers.
#[test]
fn the_default_entry_is_chosen_as_grub_does() {
    let by_id = format!("gnulinux-advanced-{ROOT_UUID}>gnulinux-6.1.0-9-advanced-{ROOT_UUID}");
    let by_title = "Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1.0-9";
    for (default, kernel) in [
        (by_id.as_str(), &b"kernel 9"[..]),
        (by_title, b"kernel 9"),
        ("1>1", b"kernel 9"),
        ("1", b"kernel 40"),
        ("7", b"kernel 40"),
        ("no such entry", b"kernel 40"),
    ] {
        let image = debian_root().file("boot/grub/grub.cfg", debian_grub_cfg(default).as_bytes());
        assert_eq!(boot(&ext4(&image)).unwrap().kernel, kernel, "{default}");
        // `next_entry` is for one boot, and nobody would clear it.
        let environment =
            format!("# GRUB Environment Block\nsaved_entry={default}\nnext_entry=0\n");
        let image = debian_root()
            .file("boot/grub/grub.cfg", debian_grub_cfg("${saved_entry}").as_bytes())
            .file("boot/grub/grubenv", environment.as_bytes());
        assert_eq!(boot(&ext4(&image)).unwrap().kernel, kernel, "saved: {default}");
    }
}

/// Ubuntu's cloud image: /boot is a partition of its own, the entry has a variant without an
/// initrd, and `search` says where the files are.
#[test]
fn ubuntu_boots_from_its_own_boot_partition_with_its_initrd() {
    let grub_cfg = include_str!("ubuntu-grub.cfg").replace("@UUID@", images::BOOT_UUID);
    let boot_partition = Ext4Image::new()
        .uuid(images::BOOT_UUID)
        .file("vmlinuz-6.8.0-45-generic", b"kernel")
        .file("initrd.img-6.8.0-45-generic", b"initrd")
        .file("grub/grub.cfg", grub_cfg.as_bytes())
        .link("vmlinuz", "vmlinuz-6.8.0-45-generic");
    let root = Ext4Image::new().file("etc/os-release", b"NAME=Ubuntu\n");
    let boot = boot(&gpt(&[ext4(&root), ext4(&boot_partition)])).unwrap();
    assert_eq!((&boot.kernel[..], boot.initrd.as_deref()), (&b"kernel"[..], Some(&b"initrd"[..])));
    let command_line = "root=LABEL=cloudimg-rootfs ro console=tty1 console=ttyS0 console=ttyS0";
    assert_eq!(boot.command_line, command_line);
}

fn fedora_entry(version: &str) -> (String, String) {
    let id = format!("loader/entries/0123456789abcdef-{version}.conf");
    let text = format!(
        "title Fedora Linux ({version}) 41 (Cloud Edition)\nversion {version}\n\
         linux /vmlinuz-{version}\ninitrd /initramfs-{version}.img $tuned_initrd\n\
         options root=UUID=abc ro $kernelopts $tuned_params\ngrub_users $grub_users\n\
         grub_arg --unrestricted\ngrub_class fedora\n"
    );
    (id, text)
}

fn fedora_boot(saved_entry: &str) -> Ext4Image {
    let environment = format!(
        "# GRUB Environment Block\nsaved_entry={saved_entry}\nkernelopts=rootflags=subvol=root\n"
    );
    let mut image = Ext4Image::new()
        .file("grub2/grub.cfg", include_str!("fedora-grub.cfg").as_bytes())
        .file("grub2/grubenv", environment.as_bytes());
    for version in ["6.9.9-200.fc41.x86_64", "6.11.4-301.fc41.x86_64", "0-rescue"] {
        let (path, text) = fedora_entry(version);
        image = image
            .file(&path, text.as_bytes())
            .file(&format!("vmlinuz-{version}"), version.as_bytes())
            .file(&format!("initramfs-{version}.img"), b"initrd");
    }
    image
}

/// Fedora: entries on /boot, chosen by `saved_entry`, else the newest; the root is Btrfs, which
/// is not needed here.
#[test]
fn fedora_boots_by_its_entries() {
    let mut btrfs = vec![0; 1 << 20];
    btrfs[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
    for (saved, kernel) in [
        ("", "6.11.4-301.fc41.x86_64"),
        ("0123456789abcdef-6.9.9-200.fc41.x86_64", "6.9.9-200.fc41.x86_64"),
        ("1", "6.9.9-200.fc41.x86_64"),
        ("0123456789abcdef-0-rescue", "0-rescue"),
        ("one that was removed", "6.11.4-301.fc41.x86_64"),
    ] {
        let disk = gpt(&[ext4(&fedora_boot(saved)), btrfs.clone()]);
        let boot = boot(&disk).unwrap();
        assert_eq!(boot.kernel, kernel.as_bytes(), "{saved}");
        assert_eq!(boot.initrd.as_deref(), Some(&b"initrd"[..]));
        let line = "root=UUID=abc ro rootflags=subvol=root console=ttyS0";
        assert_eq!(boot.command_line.split_whitespace().collect::<Vec<_>>().join(" "), line);
    }
}

/// systemd-boot: entries on the ESP, with several initrds and a pattern as default.
#[test]
fn entries_on_the_esp() {
    let esp = vfat(
        16,
        &[
            ("loader/loader.conf", b"timeout 3\ndefault debian-6.1*\n"),
            (
                "loader/entries/debian-6.1.conf",
                b"title Debian\nversion 6.1\nlinux /debian/6.1/linux\ninitrd /debian/ucode\n\
                  initrd /debian/6.1/initrd.img\noptions root=/dev/vda2\noptions rw\n",
            ),
            ("loader/entries/debian-6.12.conf", b"linux /debian/6.12/linux\n"),
            ("debian/6.1/linux", b"the older kernel"),
            ("debian/ucode", b"ucode"),
            ("debian/6.1/initrd.img", b"initrd"),
        ],
    );
    let boot = boot(&mbr(&[esp])).unwrap();
    assert_eq!(boot.kernel, b"the older kernel");
    assert_eq!(boot.initrd.as_deref(), Some(&b"ucode\0\0\0initrd"[..]));
    assert_eq!(boot.command_line, "root=/dev/vda2 rw console=ttyS0");
}

/// Entries beside a grub.cfg with its own menu are another loader's remains.
#[test]
fn grub_that_shows_no_entries_decides_alone() {
    let (path, text) = fedora_entry("9.9");
    let image = debian_root().file(&format!("boot/{path}"), text.as_bytes());
    assert_eq!(boot(&ext4(&image)).unwrap().kernel, b"kernel 40");
}

/// Without any loader, the links that Debian keeps; with a line that finds the root.
#[test]
fn links_are_the_last_resort() {
    let image = Ext4Image::new()
        .file("usr/lib/kernel/here", b"kernel")
        .link("boot", "usr/lib/kernel")
        .link("vmlinuz", "/boot/../kernel/./here")
        .link("initrd.img", "boot/nothing");
    let boot = boot(&ext4(&image)).unwrap();
    assert_eq!((&boot.kernel[..], boot.initrd), (&b"kernel"[..], None));
    assert_eq!(boot.command_line, format!("root=UUID={ROOT_UUID} ro console=ttyS0"));
}

/// A guest that was switched off has its newest files in the journal; they count.
#[test]
fn the_journal_is_read() {
    let image = ext4(&debian_root().options("has_journal,64bit,metadata_csum"));
    let kernel = "/boot/vmlinuz-6.1.0-40-cloud-amd64";
    let written = with_journalled_write(&image, kernel, b"kernel 41");
    assert_ne!(written[1024 + 0x60] & 4, 0, "needs recovery");
    assert_eq!(boot(&image).unwrap().kernel, b"kernel 40");
    assert_eq!(boot(&written).unwrap().kernel, b"kernel 41");
    // A journal of long ago is passed over, as boot loaders do.
    let mut image = ext4(&debian_root().options("has_journal,^64bit,^metadata_csum"));
    image[1024 + 0x60] |= 4;
    assert_eq!(boot(&image).unwrap().kernel, b"kernel 40");
}

/// All tables lead to the same filesystem; a damaged GPT is mended from its copy.
#[test]
fn partition_tables() {
    let root = ext4(&debian_root());
    let empty = vec![0; 1 << 20];
    let disks = [
        gpt(&[empty.clone(), root.clone()]),
        mbr(&[empty.clone(), root.clone()]),
        // More than four make the MBR have an extended partition.
        mbr(&[vec![1; 512], vec![1; 512], empty.clone(), empty.clone(), empty, root]),
    ];
    for (disk, number) in disks.iter().zip([2, 2, 7]) {
        let text = boot(disk).unwrap().description;
        assert!(text.starts_with(&format!("partition {number} (ext4)")), "{text}");
    }
    // Header, entries: each alone, then with the copy.
    for at in [512 + 60, 1024 + 40] {
        let mut disk = disks[0].clone();
        disk[at] ^= 1;
        assert_eq!(boot(&disk).unwrap().kernel, b"kernel 40");
        let end = disk.len();
        disk[end - 512 + 60] ^= 1;
        assert!(error(&disk).contains("(GPT) is damaged"), "{}", error(&disk));
    }
    // A disk that has grown keeps its copy where its end was.
    let mut grown = disks[0].clone();
    grown.resize(grown.len() + (1 << 20), 0);
    assert_eq!(boot(&grown).unwrap().kernel, b"kernel 40");
}

/// Each disk that does not boot has one reason, which its owner understands.
#[test]
fn disks_that_make_no_sense_are_explained() {
    let broken_entry = debian_root().without("boot/vmlinuz-6.1.0-40-cloud-amd64");
    let no_initrd = debian_root().without("boot/initrd.img-6.1.0-40-cloud-amd64");
    let nothing = ext4(&Ext4Image::new().file("etc/hostname", b"x"));
    let mut damaged = ext4(&debian_root());
    damaged[1024 + 0x18] = 99;
    let mut xfs = vec![0; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    let rocky = gpt(&[vfat(2, &[("EFI/x", b"")]), xfs.clone()]);
    let circle = Ext4Image::new().link("vmlinuz", "initrd.img").link("initrd.img", "vmlinuz");
    let large = debian_root().file("boot/vmlinuz-6.1.0-40-cloud-amd64", &vec![7; (1 << 20) + 1]);
    let script = debian_root().file("boot/grub/grub.cfg", b"menuentry 'x' {\n");
    let long = format!("menuentry x {{\nlinux /vmlinuz {}\n}}\n", "a".repeat(2040));
    let long = debian_root().file("boot/grub/grub.cfg", long.as_bytes());
    let directory = Ext4Image::new().file("vmlinuz/x", b"");
    let mut past_the_end = ext4(&debian_root());
    past_the_end.truncate(64 << 10);
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("nothing", Vec::new(), "neither a partition table nor a filesystem"),
        ("zeros", vec![0; 1 << 20], "neither a partition table nor a filesystem"),
        ("short", vec![0x55; 100], "neither a partition table nor a filesystem"),
        (
            "no entry",
            gpt(&[nothing]),
            "no boot entry (loader/entries, grub.cfg, /vmlinuz) on partition 1 (ext4)",
        ),
        (
            "no kernel",
            gpt(&[ext4(&broken_entry)]),
            "partition 1 (ext4): /boot/vmlinuz-6.1.0-40-cloud-amd64, which boot entry 'Debian GNU/Linux' names, is not there",
        ),
        (
            "no initrd",
            ext4(&no_initrd),
            "the disk (ext4): /boot/initrd.img-6.1.0-40-cloud-amd64, which boot entry",
        ),
        (
            "damaged",
            gpt(&[vec![0; 4096], damaged]),
            "partition 2: the filesystem is damaged: its superblock has an impossible block size",
        ),
        (
            "xfs",
            gpt(&[xfs]),
            "no partition has a filesystem that can be read (ext4, vfat); there is: XFS on partition 1",
        ),
        ("rocky", rocky, "on partition 1 (vfat); what cannot be read here: XFS on partition 2"),
        ("circle", ext4(&circle), "/vmlinuz: lies too deep"),
        ("large", ext4(&large), "has 1048577 bytes, more than 1048576"),
        ("script", ext4(&script), "/boot/grub/grub.cfg: line 1: a block has no end"),
        ("long line", ext4(&long), "the command line of boot entry 'x' has 2054 bytes"),
        ("directory", ext4(&directory), "/vmlinuz: is no regular file"),
        ("cut", past_the_end, "the filesystem is damaged"),
    ];
    for (name, disk, text) in cases {
        let error = error(disk);
        assert!(error.contains(text), "{name}: {error}");
    }
}

/// Found by damaging ext2 at random: the size's upper half made the crate ask for 30 GB at once,
/// which ends the process, although this filesystem has no 64 bits.
#[test]
fn a_size_of_64_bits_in_a_filesystem_without() {
    let options = "^has_journal,^metadata_csum,^64bit";
    let mut disk = ext4(&debian_root().options(options));
    disk[1024 + 0x150..1024 + 0x154].copy_from_slice(&0x7fff_u32.to_le_bytes());
    assert!(error(&disk).contains("its superblock has an impossible size"), "{}", error(&disk));
}

/// What a script or an entry makes of little text stays little.
#[test]
fn short_texts_do_not_grow() {
    let value = "v".repeat(4000);
    let environment = format!("# GRUB Environment Block\na={value}\n");
    let entry = format!("linux /k\n{}", "options $a\n".repeat(4000));
    let image = Ext4Image::new()
        .file("boot/grub/grubenv", environment.as_bytes())
        .file("boot/loader/entries/a.conf", entry.as_bytes());
    assert!(error(&ext4(&image)).contains("at most 2047 fit"), "{}", error(&ext4(&image)));
    let script = format!("a={value}\nlinux {}\n", "$a".repeat(1000));
    let image = Ext4Image::new().file("boot/grub/grub.cfg", script.as_bytes());
    assert!(error(&ext4(&image)).contains("a command is too long"), "{}", error(&ext4(&image)));
}

/// All of it works on a stack as small as its thread's smallest use.
#[test]
fn needs_little_stack() {
    let disk = gpt(&[ext4(&debian_root())]);
    let thread = std::thread::Builder::new().stack_size(256 << 10);
    let kernel = thread.spawn(move || boot(&disk).unwrap().kernel).unwrap().join().unwrap();
    assert_eq!(kernel, b"kernel 40");
}

/// FAT12, FAT16 and FAT32 with long names, short ones and files over many clusters.
#[test]
fn every_width_of_fat() {
    let kernel: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    let entry = b"linux /A long directory/Another kernel, with a long name\n";
    for mebibytes in [2, 16, 64] {
        let esp = vfat(
            mebibytes,
            &[
                ("loader/entries/a.conf", &entry[..]),
                ("A long directory/another Kernel, with a long name", &kernel),
            ],
        );
        assert!(boot(&esp).unwrap().kernel == kernel, "{mebibytes} MiB");
    }
}
