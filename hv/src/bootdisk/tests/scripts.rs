//! Parsers by themselves: what they read, and that no text makes them panic.

use proptest::prelude::*;

use super::super::bls::{BlsEntry, compare_versions};
use super::super::grub::{Variables, parse};
use super::super::partitions::partitions;
use super::super::read::Window;

#[test]
fn versions_are_ordered_as_people_mean() {
    let sorted =
        ["0-rescue", "5.10.0-9", "6.1~rc1", "6.1", "6.1.0-9", "6.1.0-40", "6.9.9", "6.11.4"];
    for pair in sorted.windows(2) {
        assert!(compare_versions(pair[0], pair[1]).is_lt(), "{pair:?}");
        assert!(compare_versions(pair[1], pair[0]).is_gt(), "{pair:?}");
    }
}

#[test]
fn boot_counting_puts_bad_entries_last() {
    let parse = |name: &str| BlsEntry::parse(name, "linux /k\n", &Variables::default()).unwrap();
    let (good, bad) = (parse("a-1+3-1.conf"), parse("a-2+0-3.conf"));
    assert_eq!((good.id.as_str(), bad.id.as_str()), ("a-1", "a-2"));
    assert!(good.menu_order(&bad).is_lt());
    assert_eq!(BlsEntry::parse("efi.conf", "efi /x.efi\n", &Variables::default()), None);
}

#[test]
fn an_environment_block_is_read() {
    let block = b"# GRUB Environment Block\n# WARNING: Do not edit\nsaved_entry=a>b\n\
                  kernelopts=root=UUID=1 ro\n##########";
    let variables = Variables::from_environment(block);
    assert_eq!(variables.get("saved_entry"), "a>b");
    assert_eq!(variables.expand("$kernelopts ${none}$ x$"), "root=UUID=1 ro $ x$");
}

/// A value that doubles with each line stays bounded.
#[test]
fn variables_cannot_grow_without_end() {
    let mut variables = Variables::default();
    variables.set("a", "0123456789abcdef");
    for _ in 0..100 {
        let doubled = variables.expand("$a$a");
        variables.set("a", doubled);
    }
    assert!(variables.get("a").len() <= 4096);
}

#[test]
fn bad_scripts_name_the_line() {
    for (script, text) in [
        ("set a='x\n", "line 2: a quote is not closed"),
        ("\nif true; then\n", "line 2: a block has no end"),
        ("fi\n", "line 1: a block ends that has not begun"),
        (&"if true; then\n".repeat(40), "line 17: blocks are nested too deep"),
    ] {
        assert_eq!(parse(script).unwrap_err().to_string(), text);
    }
}

proptest! {
    /// Whatever the text, there is a tree or an error.
    #[test]
    fn no_script_panics(text in "(if|then|else|elif|fi|for|do|done|menuentry|\\{|\\}|\\$a|\\$\\{|'|\"|\\\\|;|\n|\\[|\\]| |x|set|=|#|é){0,80}") {
        let _ = parse(&text);
        let _ = BlsEntry::parse("x.conf", &text, &Variables::from_environment(text.as_bytes()));
    }

    /// The order of versions is total, or sorting would panic.
    #[test]
    fn versions_have_a_total_order(a in "[0-9a~.^_-]{0,8}", b in "[0-9a~.^_-]{0,8}", c in "[0-9a~.^_-]{0,8}") {
        prop_assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
        if compare_versions(&a, &b).is_le() && compare_versions(&b, &c).is_le() {
            prop_assert!(compare_versions(&a, &c).is_le());
        }
    }

    /// Any sectors as a table: all partitions lie inside of the disk.
    #[test]
    fn no_table_panics(mut disk in proptest::collection::vec(any::<u8>(), 512..4096), flags in any::<[bool; 4]>()) {
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        for (index, extended) in flags.into_iter().enumerate() {
            let entry = &mut disk[446 + index * 16..][..16];
            entry[0] = 0;
            entry[9..12].fill(0);
            if extended {
                entry[4] = 5;
            }
        }
        let size = disk.len() as u64;
        if let Ok(Some(partitions)) = partitions(&Window::whole(Box::new(disk))) {
            for partition in partitions {
                prop_assert!(partition.start + partition.length <= size);
            }
        }
    }
}
