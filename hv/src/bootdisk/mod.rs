//! Finds and reads the kernel that lies inside of a disk image, as the disk's own boot loader
//! would.
//!
//! ```text
//!  read        positional reads, counted
//!    └ partitions   GPT, MBR, or none at all
//!        └ filesystem   ext4 (crate ext4-view), fat; chosen by magic
//!            ├ bls          entries of the Boot Loader Specification
//!            ├ grub, menu   grub.cfg: parsed, then run as far as it chooses a kernel
//!            ├ /vmlinuz     the links that Debian keeps
//!            └ root         where the entry's root is, when it must be this very disk
//! ```
//!
//! What is on the disk is the guest's: this is the place where Xen's pygrub was broken. So it is
//! memory-safe code that runs in the domain's own process, opens nothing but the disk, and never
//! writes. Everything is bounded: partitions, entries, directories, links, sizes, and, for what
//! these leave out, the number of reads. A panic would be a defect of ours or of `ext4-view`; the
//! caller runs this on a thread of its own, so that it would end as an error.
//!
//! Start reading at [`find`].

mod bls;
mod ext4;
mod fat;
mod filesystem;
mod grub;
mod menu;
mod partitions;
mod read;
mod root;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::config::COMMAND_LINE_BYTES_MAX;
use filesystem::{Content, Filesystem, FsError};
use read::Window;
pub use read::{DiskFile, ReadAt};

/// Where GRUB's configuration is, in the order in which it is looked for.
const GRUB_DIRECTORIES: [&str; 4] = ["/grub", "/grub2", "/boot/grub", "/boot/grub2"];
/// Where entries of the Boot Loader Specification are, and what their paths may lack.
const BLS_DIRECTORIES: [(&str, &str); 2] = [("/loader", ""), ("/boot/loader", "/boot")];
/// The links that Debian and Ubuntu keep to the newest kernel.
const LINKS: [(&str, &str); 3] = [
    ("/vmlinuz", "/initrd.img"),
    ("/boot/vmlinuz", "/boot/initrd.img"),
    ("/boot/vmlinuz-linux", "/boot/initramfs-linux.img"),
];
/// Most filesystems that are looked into, the first ones.
const VOLUMES_MAX: usize = 16;
/// Longest title in a message, characters.
const TITLE_CHARS_MAX: usize = 50;

/// What a boot may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest kernel, bytes.
    pub kernel_bytes_max: u64,
    /// Largest initrd, bytes, all parts together.
    pub initrd_bytes_max: u64,
}

/// What the disk boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// The kernel file.
    pub kernel: Vec<u8>,
    /// The initrd, if the entry has one; several are put one behind the other.
    pub initrd: Option<Vec<u8>>,
    /// The entry's command line, and behind it what was asked for.
    pub command_line: String,
    /// What was chosen, for people: partition, entry, path.
    pub description: String,
}

/// Why a disk does not boot, for the one whose disk it is.
#[derive(Debug, thiserror::Error)]
pub enum BootDiskError {
    /// The file or device cannot be read.
    #[error("the disk cannot be read: {0}")]
    Read(String),
    /// There is nothing on it.
    #[error("the disk has neither a partition table nor a filesystem")]
    Empty,
    /// The table is there and damaged.
    #[error("{0}")]
    Table(String),
    /// Partitions, and nothing that can be read in them.
    #[error("no partition has a filesystem that can be read (ext4, vfat); there is: {0}")]
    NoFilesystem(String),
    /// No boot loader's entry.
    #[error("no boot entry (loader/entries, grub.cfg, /vmlinuz) on {0}")]
    NoEntry(String),
    /// An entry names what is not there.
    #[error("{place}: {path}, which boot entry '{entry}' names, is not there")]
    Missing {
        /// The partition.
        place: String,
        /// The file.
        path: String,
        /// The entry's title.
        entry: String,
    },
    /// A filesystem that cannot be used.
    #[error("{place}: {what}")]
    Filesystem {
        /// The partition.
        place: String,
        /// What is wrong with it.
        what: String,
    },
    /// A file that cannot be used.
    #[error("{place}: {path}: {what}")]
    File {
        /// The partition.
        place: String,
        /// The file.
        path: String,
        /// What is wrong with it.
        what: String,
    },
    /// The root must be on this disk, and is not.
    #[error("boot entry '{entry}' has its root at {root}, which is not on this disk")]
    Root {
        /// The entry's title.
        entry: String,
        /// What it says.
        root: String,
    },
    /// Too long, or not text.
    #[error("the command line of boot entry '{entry}' {what}")]
    CommandLine {
        /// The entry's title.
        entry: String,
        /// What is wrong with it.
        what: String,
    },
}

/// A filesystem on the disk.
struct Volume {
    /// The partition, from 1 on; `None` is the whole disk.
    number: Option<u32>,
    filesystem: Filesystem,
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", place(self.number), self.filesystem.kind())
    }
}

fn place(number: Option<u32>) -> String {
    number.map_or_else(|| "the disk".into(), |number| format!("partition {number}"))
}

/// What an entry says is to be booted.
struct Choice {
    source: String,
    entry: String,
    kernel: (usize, String),
    initrds: Vec<(usize, String)>,
    command_line: String,
}

/// Finds what the disk boots and reads it. `command_line` goes behind the entry's own, where it
/// wins. With `own_root`, the name by which the guest knows this disk (`vda`), a root that the
/// entry names by UUID or label is looked up on this disk and becomes its device.
///
/// # Errors
/// When the disk makes no sense; the text says where.
pub fn find(
    disk: Box<dyn ReadAt>,
    limits: Limits,
    command_line: &str,
    own_root: Option<&str>,
) -> Result<Boot, BootDiskError> {
    let disk = Window::whole(disk);
    let Mounted { volumes, table, others, problem } = mount(&disk)?;
    match choose(&volumes) {
        Ok(Some(mut choice)) => {
            if let Some(device) = own_root {
                let (entry, line) = (&choice.entry, &choice.command_line);
                choice.command_line = root::replace(entry, line, &disk, table.as_deref(), device)?;
            }
            load(&volumes, &choice, limits, command_line)
        }
        // A damaged filesystem is the likeliest reason why no entry was found.
        Ok(None) => Err(problem.unwrap_or_else(|| {
            let places: Vec<String> = volumes.iter().map(Volume::to_string).collect();
            let unread = match others.is_empty() {
                true => String::new(),
                false => format!("; what cannot be read here: {}", others.join(", ")),
            };
            BootDiskError::NoEntry(places.join(", ") + &unread)
        })),
        Err(error) => Err(error),
    }
}

/// What lies on a disk.
struct Mounted {
    volumes: Vec<Volume>,
    table: Option<Vec<partitions::Partition>>,
    /// What is known but cannot be read, and where, for people.
    others: Vec<String>,
    /// Why the first filesystem that should have been read was not.
    problem: Option<BootDiskError>,
}

fn mount(disk: &Window) -> Result<Mounted, BootDiskError> {
    let table = partitions::partitions(disk).map_err(|error| match error {
        partitions::TableError::Gpt => BootDiskError::Table(error.to_string()),
        partitions::TableError::Read(error) => BootDiskError::Read(error.to_string()),
    })?;
    let parts: Vec<(Option<u32>, Window)> = match &table {
        Some(partitions) => {
            partitions.iter().map(|p| (Some(p.number), disk.part(p.start, p.length))).collect()
        }
        None => vec![(None, disk.clone())],
    };
    let (mut volumes, mut others, mut problem) = (Vec::new(), Vec::new(), None);
    for (number, window) in parts {
        if volumes.len() == VOLUMES_MAX {
            break;
        }
        match Filesystem::open(&window) {
            Ok(Content::Readable(filesystem)) => volumes.push(Volume { number, filesystem }),
            Ok(Content::Other(name)) => others.push(format!("{name} on {}", place(number))),
            Ok(Content::Unknown) => {}
            Err(error) => {
                let (place, what) = (place(number), error.to_string());
                problem.get_or_insert(BootDiskError::Filesystem { place, what });
            }
        }
    }
    if volumes.is_empty() {
        return Err(match (problem, table) {
            (Some(problem), _) => problem,
            (None, None) if others.is_empty() => BootDiskError::Empty,
            (None, _) if others.is_empty() => BootDiskError::NoFilesystem("nothing known".into()),
            (None, _) => BootDiskError::NoFilesystem(others.join(", ")),
        });
    }
    Ok(Mounted { volumes, table, others, problem })
}

/// What GRUB's configuration on a volume says.
struct GrubConfig {
    directory: &'static str,
    script: Vec<grub::Node>,
}

fn choose(volumes: &[Volume]) -> Result<Option<Choice>, BootDiskError> {
    let mut configs = Vec::new();
    for volume in volumes {
        configs.push(grub_config(volume)?);
    }
    let mut runs = Vec::new();
    for (home, config) in configs.iter().enumerate() {
        let Some(GrubConfig { directory, script }) = config else {
            runs.push(None);
            continue;
        };
        let run = menu::Run::start(volumes, home, directory, script);
        runs.push(Some((
            *directory,
            run.map_err(|what| script_error(&volumes[home], directory, what))?,
        )));
    }
    for (home, volume) in volumes.iter().enumerate() {
        let grub = runs[home].as_ref().map(|(_, run)| run);
        // Entries that GRUB does not show are left over from another loader.
        if grub.is_none_or(|run| run.wants_bls || !run.has_menu())
            && let Some(choice) = choose_bls(home, volume, grub)?
        {
            return Ok(Some(choice));
        }
    }
    for (home, run) in runs.iter().enumerate() {
        let Some((directory, run)) = run else { continue };
        let chosen = run.choose().map_err(|what| script_error(&volumes[home], directory, what))?;
        if let Some((entry, linux)) = chosen {
            return Ok(Some(Choice {
                source: format!("{}, {directory}/grub.cfg", volumes[home]),
                entry,
                kernel: linux.kernel,
                initrds: linux.initrds,
                command_line: linux.arguments,
            }));
        }
    }
    for (home, volume) in volumes.iter().enumerate() {
        if let Some(choice) = choose_link(home, volume)? {
            return Ok(Some(choice));
        }
    }
    Ok(None)
}

fn script_error(volume: &Volume, directory: &str, what: impl fmt::Display) -> BootDiskError {
    let path = format!("{directory}/grub.cfg");
    BootDiskError::File { place: volume.to_string(), path, what: what.to_string() }
}

fn file_error(volume: &Volume, path: &str, error: &FsError) -> BootDiskError {
    let (place, path, what) = (volume.to_string(), path.to_owned(), error.to_string());
    BootDiskError::File { place, path, what }
}

fn grub_config(volume: &Volume) -> Result<Option<GrubConfig>, BootDiskError> {
    for directory in GRUB_DIRECTORIES {
        let path = format!("{directory}/grub.cfg");
        let text = volume.filesystem.read_if_there(&path, grub::CONFIG_BYTES_MAX);
        let Some(text) = text.map_err(|error| file_error(volume, &path, &error))? else { continue };
        let script = grub::parse(&String::from_utf8_lossy(&text))
            .map_err(|error| script_error(volume, directory, error))?;
        return Ok(Some(GrubConfig { directory, script }));
    }
    Ok(None)
}

/// GRUB's environment block of a volume; empty when there is none.
fn environment(volume: &Volume) -> grub::Variables {
    let mut paths = GRUB_DIRECTORIES.map(|directory| format!("{directory}/grubenv")).into_iter();
    paths.find_map(|path| menu::environment(volume, &path)).unwrap_or_default()
}

fn choose_bls(
    home: usize,
    volume: &Volume,
    grub: Option<&menu::Run<'_>>,
) -> Result<Option<Choice>, BootDiskError> {
    let variables = match grub {
        Some(run) => run.variables.clone(),
        None => environment(volume),
    };
    for (loader, prefix) in BLS_DIRECTORIES {
        let directory = format!("{loader}/entries");
        let wrong = |path: &str, error: &FsError| file_error(volume, path, error);
        let names = volume.filesystem.list(&directory).map_err(|e| wrong(&directory, &e))?;
        let mut names: Vec<String> = names.into_iter().filter(|n| n.ends_with(".conf")).collect();
        // The same whatever order the directory has, also when there are too many.
        names.sort_unstable();
        names.truncate(bls::ENTRIES_MAX);
        let mut entries = Vec::new();
        for name in names {
            let path = format!("{directory}/{name}");
            let text = volume.filesystem.read_if_there(&path, bls::ENTRY_BYTES_MAX);
            let Some(text) = text.map_err(|error| wrong(&path, &error))? else { continue };
            let text = String::from_utf8_lossy(&text);
            entries.extend(bls::BlsEntry::parse(&name, &text, &variables));
        }
        bls::sort(&mut entries);
        let loader_conf = volume
            .filesystem
            .read_if_there(&format!("{loader}/loader.conf"), bls::ENTRY_BYTES_MAX)
            .ok()
            .flatten()
            .unwrap_or_default();
        let loader_conf = String::from_utf8_lossy(&loader_conf);
        let wanted = [variables.get("default"), variables.get("saved_entry")]
            .into_iter()
            .find(|wanted| !wanted.is_empty())
            .or_else(|| bls::loader_default(&loader_conf))
            .unwrap_or_default();
        let Some(entry) = bls::choose(&entries, wanted) else { continue };
        // Paths begin at the root of the filesystem; some begin at /boot although it is none.
        let whole = |path: &String| {
            let there = volume.filesystem.exists(path).unwrap_or(true);
            (home, if there { path.clone() } else { format!("{prefix}{path}") })
        };
        return Ok(Some(Choice {
            source: format!("{volume}, {directory}/{}.conf", entry.id),
            entry: entry.name().to_owned(),
            kernel: whole(&entry.linux),
            initrds: entry.initrds.iter().take(bls::INITRDS_MAX).map(whole).collect(),
            command_line: entry.options.clone(),
        }));
    }
    Ok(None)
}

fn choose_link(home: usize, volume: &Volume) -> Result<Option<Choice>, BootDiskError> {
    for (kernel, initrd) in LINKS {
        let exists = |path: &str| {
            volume.filesystem.exists(path).map_err(|error| file_error(volume, path, &error))
        };
        if exists(kernel)? {
            let initrds =
                if exists(initrd)? { vec![(home, initrd.to_owned())] } else { Vec::new() };
            return Ok(Some(Choice {
                source: volume.to_string(),
                entry: kernel.to_owned(),
                kernel: (home, kernel.to_owned()),
                initrds,
                // There is no entry to say it, and this is the filesystem that the links are in.
                command_line: format!("root=UUID={} ro", volume.filesystem.uuid()),
            }));
        }
    }
    Ok(None)
}

fn load(
    volumes: &[Volume],
    choice: &Choice,
    limits: Limits,
    command_line: &str,
) -> Result<Boot, BootDiskError> {
    let entry = short(&choice.entry);
    let read = |(volume, path): &(usize, String), bytes_max: u64| {
        let volume = &volumes[*volume];
        volume.filesystem.read(path, bytes_max).map_err(|error| match error {
            FsError::NotFound => BootDiskError::Missing {
                place: volume.to_string(),
                path: path.clone(),
                entry: entry.clone(),
            },
            error => file_error(volume, path, &error),
        })
    };
    let command_line = [choice.command_line.trim(), command_line.trim()].join(" ");
    let command_line = command_line.trim().to_owned();
    let wrong = |what: String| BootDiskError::CommandLine { entry: entry.clone(), what };
    if command_line.len() > COMMAND_LINE_BYTES_MAX {
        let length = command_line.len();
        let what = format!(
            "has {length} bytes with what the domain adds; at most {COMMAND_LINE_BYTES_MAX} fit"
        );
        return Err(wrong(what));
    }
    if command_line.contains(['\0', '\n', '\r']) {
        return Err(wrong("is not one line of text".into()));
    }
    let kernel = read(&choice.kernel, limits.kernel_bytes_max)?;
    let mut initrd = None;
    for part in &choice.initrds {
        let all: &mut Vec<u8> = initrd.get_or_insert_default();
        // Each begins at a multiple of four.
        all.resize(all.len().next_multiple_of(4), 0);
        let room = limits.initrd_bytes_max.saturating_sub(all.len() as u64);
        let bytes = read(part, room)?;
        if all.is_empty() {
            *all = bytes;
        } else {
            all.extend(bytes);
        }
    }
    let (volume, path) = &choice.kernel;
    let description = format!("{}, entry '{entry}': {path} on {}", choice.source, volumes[*volume]);
    Ok(Boot { kernel, initrd, command_line, description })
}

/// A guest's text for a message: one line, not too long.
fn short(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    match text.char_indices().nth(TITLE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
