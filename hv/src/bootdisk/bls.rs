//! Boot Loader Specification, type 1 entries: one small file an entry, in `loader/entries`.
//!
//! Fedora's differ: their `options` may name variables of GRUB's environment block, as in
//! `$kernelopts`.

use std::cmp::{Ordering, Reverse};

use super::grub::Variables;

/// Most entries that are read.
pub(super) const ENTRIES_MAX: usize = 256;
/// Largest entry, bytes.
pub(super) const ENTRY_BYTES_MAX: u64 = 64 << 10;
/// Lines of options are put together up to about this, bytes; no kernel takes as much.
const OPTIONS_BYTES_MAX: usize = 8 << 10;
/// Most initrds of one entry.
pub(super) const INITRDS_MAX: usize = 16;

/// An entry that boots Linux.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct BlsEntry {
    /// The file's name without `.conf` and without the counter of tries.
    pub(super) id: String,
    pub(super) title: String,
    version: String,
    machine_id: String,
    sort_key: String,
    /// Boot counting has found that it does not work.
    is_bad: bool,
    pub(super) linux: String,
    pub(super) initrds: Vec<String>,
    pub(super) options: String,
}

impl BlsEntry {
    /// `None` for an entry that names no kernel, such as one of an EFI program.
    pub(super) fn parse(file_name: &str, text: &str, variables: &Variables) -> Option<Self> {
        let stem = file_name.strip_suffix(".conf")?;
        let (id, is_bad) = without_tries(stem);
        let mut entry = Self { id: id.to_owned(), is_bad, ..Self::default() };
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
            let value = value.trim_start();
            match key {
                "title" => value.clone_into(&mut entry.title),
                "version" => value.clone_into(&mut entry.version),
                "machine-id" => value.clone_into(&mut entry.machine_id),
                "sort-key" => value.clone_into(&mut entry.sort_key),
                "linux" => entry.linux = variables.expand(value),
                "initrd" if entry.initrds.len() < INITRDS_MAX => {
                    let names = variables.expand(value);
                    let names = names.split_whitespace().take(INITRDS_MAX);
                    entry.initrds.extend(names.map(str::to_owned));
                }
                "options" if entry.options.len() < OPTIONS_BYTES_MAX => {
                    let options = variables.expand(value);
                    if !entry.options.is_empty() {
                        entry.options.push(' ');
                    }
                    entry.options.push_str(options.trim());
                }
                _ => {}
            }
        }
        (!entry.linux.is_empty()).then_some(entry)
    }

    /// The name for people.
    pub(super) fn name(&self) -> &str {
        if self.title.is_empty() { &self.id } else { &self.title }
    }

    fn version_or_id(&self) -> &str {
        if self.version.is_empty() { &self.id } else { &self.version }
    }

    /// The order of a boot loader's menu: the newest version first.
    pub(super) fn menu_order(&self, other: &Self) -> Ordering {
        let by_key = |entry: &Self| (entry.is_bad, entry.sort_key.is_empty());
        let ids = || compare_versions(&other.id, &self.id);
        by_key(self).cmp(&by_key(other)).then_with(|| {
            if self.sort_key.is_empty() {
                // Rescue entries have a version that begins with 0; so they come last.
                compare_versions(other.version_or_id(), self.version_or_id()).then_with(ids)
            } else {
                let (a, b) = (&self.sort_key, &other.sort_key);
                a.cmp(b)
                    .then_with(|| self.machine_id.cmp(&other.machine_id))
                    .then_with(|| compare_versions(&other.version, &self.version))
                    .then_with(ids)
            }
        })
    }
}

/// The entry that the loader would take from a sorted menu: the wanted one (by its name, title
/// or number; `*` at the end stands for anything), else the first.
pub(super) fn choose<'a>(sorted: &'a [BlsEntry], wanted: &str) -> Option<&'a BlsEntry> {
    let wanted = wanted.strip_suffix(".conf").unwrap_or(wanted);
    let same = |entry: &&BlsEntry| match wanted.strip_suffix('*') {
        Some(start) => entry.id.starts_with(start),
        None => entry.id == wanted || entry.title == wanted,
    };
    let by_number = || wanted.parse::<usize>().ok().and_then(|number| sorted.get(number));
    let named = (!wanted.is_empty()).then(|| sorted.iter().find(same).or_else(by_number));
    named.flatten().or_else(|| sorted.first())
}

/// `name+LEFT` and `name+LEFT-DONE` are boot counting; none left means that it is bad.
fn without_tries(stem: &str) -> (&str, bool) {
    let Some((id, tries)) = stem.rsplit_once('+') else { return (stem, false) };
    let (left, done) = tries.split_once('-').unwrap_or((tries, "0"));
    match (left.parse::<u32>(), done.parse::<u32>()) {
        (Ok(left), Ok(_)) => (id, left == 0),
        _ => (stem, false),
    }
}

/// A piece of a version, lowest kind first, as the UAPI Group's "Version Format Specification"
/// orders them.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part<'a> {
    Tilde,
    End,
    Dash,
    Caret,
    Dot,
    Word(&'a [u8]),
    /// Number of digits, then these, without zeros in front.
    Number(usize, &'a [u8]),
}

/// A total order whatever the texts are: they are the guest's.
pub(super) fn compare_versions(a: &str, b: &str) -> Ordering {
    parts(a.as_bytes()).cmp(&parts(b.as_bytes()))
}

fn parts(mut text: &[u8]) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    while let Some(first) = text.first() {
        let length = |belongs: fn(&u8) -> bool| text.iter().take_while(|c| belongs(c)).count();
        let (part, used) = match first {
            b'~' => (Some(Part::Tilde), 1),
            b'-' => (Some(Part::Dash), 1),
            b'^' => (Some(Part::Caret), 1),
            b'.' => (Some(Part::Dot), 1),
            b'0'..=b'9' => {
                let used = length(u8::is_ascii_digit);
                let zeros = text[..used].iter().take_while(|c| **c == b'0').count();
                (Some(Part::Number(used - zeros, &text[zeros..used])), used)
            }
            c if c.is_ascii_alphabetic() => {
                let used = length(u8::is_ascii_alphabetic);
                (Some(Part::Word(&text[..used])), used)
            }
            _ => (None, 1),
        };
        parts.extend(part);
        text = &text[used..];
    }
    parts.push(Part::End);
    parts
}

/// The `default` of systemd-boot's `loader.conf`.
pub(super) fn loader_default(text: &str) -> Option<&str> {
    let mut lines = text.lines().map(str::trim);
    lines.find_map(|line| line.strip_prefix("default")?.split_whitespace().next())
}

/// Sorts entries as a menu shows them.
pub(super) fn sort(entries: &mut [BlsEntry]) {
    // A stable order whatever order the directory has.
    entries.sort_by_key(|entry| Reverse(entry.id.clone()));
    entries.sort_by(BlsEntry::menu_order);
}
