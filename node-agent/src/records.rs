//! What the agent knows about each domain on its disk, and where everything of a domain lies.
//!
//! ```text
//! STATE/domains/<uid>/record         DomainRecord, replaced atomically
//!                    /config.json    what the VMM is started with
//!                    /exit.json      written by the VMM as its last act
//!                    /handover.json  written by the VMM before it gives the guest away
//!                    /vmm.lock       locked for as long as the VMM's process exists
//!                    /vmm.log        what the VMM says (and .1, the part before)
//!                    /seed.img       what cloud-init in the guest is told, where it is
//!                    /held           the guest is frozen or paused for a moment (domain::quiesce)
//! RUN/domains/<uid>/vmm.sock         the VMM's API
//! ```
//!
//! The record is written *before* anything is started or resumed under a new epoch: an agent
//! that dies in between finds a record that forbids too much, never one that forbids too little.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Version of [`DomainRecord`]'s JSON.
const RECORD_VERSION: u32 = 1;

/// The files of one domain.
#[derive(Debug, Clone)]
pub struct DomainFiles {
    /// STATE/domains/<uid>.
    pub dir: PathBuf,
    /// The [`DomainRecord`].
    pub record: PathBuf,
    /// The VMM's configuration.
    pub config: PathBuf,
    /// The VMM's last words.
    pub exit: PathBuf,
    /// The VMM's promise not to run the guest again.
    pub handover: PathBuf,
    /// Held by the VMM's process for as long as it exists.
    pub lock: PathBuf,
    /// Standard output and error of the VMM.
    pub log: PathBuf,
    /// The disk that cloud-init in the guest reads.
    pub seed: PathBuf,
    /// While the guest is frozen or paused by the agent, what is to be undone.
    pub held: PathBuf,
    /// RUN/domains/<uid>.
    pub run_dir: PathBuf,
    /// The VMM's API.
    pub socket: PathBuf,
}

/// The two directories that everything lies in.
#[derive(Debug, Clone)]
pub struct Places {
    /// Survives a reboot (`--state-dir`).
    pub state: PathBuf,
    /// Need not (`--run-dir`).
    pub run: PathBuf,
}

impl Places {
    /// The files of the domain `uid`, which must be a UUID (see [`crate::wanted::is_uid`]).
    pub fn domain(&self, uid: &str) -> DomainFiles {
        let dir = self.state.join("domains").join(uid);
        let run_dir = self.run.join("domains").join(uid);
        DomainFiles {
            record: dir.join("record"),
            config: dir.join("config.json"),
            exit: dir.join("exit.json"),
            handover: dir.join("handover.json"),
            lock: dir.join("vmm.lock"),
            log: dir.join("vmm.log"),
            seed: dir.join("seed.img"),
            held: dir.join("held"),
            socket: run_dir.join("vmm.sock"),
            dir,
            run_dir,
        }
    }

    /// The uids of all domains that have a directory here.
    pub fn domains(&self) -> Result<Vec<String>, Error> {
        let dir = self.state.join("domains");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(err) => return Err(Error::io("read directory", &dir, err)),
        };
        let mut uids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|err| Error::io("read directory", &dir, err))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if crate::wanted::is_uid(&name) {
                uids.push(name);
            }
        }
        Ok(uids)
    }
}

/// The facts about one domain that must survive the agent and the host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DomainRecord {
    /// The domain's UUID.
    pub uid: String,
    /// `domains/{id}`.
    pub name: String,
    /// The greatest epoch that was accepted; lower ones are refused for ever.
    pub epoch: u64,
    /// A VMM that was started and whose end has not been taken in.
    pub run: Option<Run>,
    /// How the last VMM ended; kept until another starts.
    pub end: Option<End>,
    /// The last `start_generation` that was obeyed; `None` before the first assignment as owner.
    pub start_generation: Option<u64>,
    /// Restarts in a row because of crashes.
    pub crash_restarts: u32,
    /// The last migration away from here that was begun, or could not be.
    pub outgoing: Option<OutgoingRecord>,
    /// The last order to save it that could not be obeyed.
    pub save: Option<SaveRecord>,
    /// The volume of the saved memory that it went on from last: there is nothing in it any more.
    pub restored: Option<String>,
}

/// A VMM that was started.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Run {
    /// The epoch that the VMM runs the guest under, or will when it is handed over.
    pub epoch: u64,
    /// The migration that it was started to receive.
    pub incoming: Option<String>,
    /// The host's boot in which it was started.
    pub boot_id: String,
    /// Known once the VMM has answered: without it, it may never have come to life.
    pub pid: Option<u32>,
    /// The guest has been seen running in it.
    pub ran: bool,
    /// The volume of the saved memory that it was started to go on from.
    pub restore: Option<String>,
}

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The epoch of its [`Run`].
    pub epoch: u64,
    /// The migration that it was started to receive.
    pub incoming: Option<String>,
    /// The guest had been seen running in it.
    pub ran: bool,
    /// Why it ended.
    pub reason: EndReason,
    /// For people.
    pub detail: String,
    /// It was to end: the assignment said so at that time.
    pub ordered: bool,
    /// It had handed the guest over before.
    pub handover: Option<Handover>,
}

/// Why a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The guest powered itself off.
    Shutdown,
    /// The guest rebooted, and its policy is to stop.
    Reboot,
    /// Panic or triple fault.
    Crash,
    /// The process was ended from outside.
    Killed,
    /// The VMM could not start or go on.
    Error,
    /// The host went down under it.
    HostRebooted,
    /// The agent died while it was starting it; it has not been alive.
    Interrupted,
    /// The guest is on its memory volume.
    Saved,
}

/// Written by the VMM (`handover.json`) before it says COMMIT: it will not run the guest again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The migration, an operation's UUID.
    pub migration_id: String,
    /// The epoch that the destination runs under.
    pub to_epoch: u64,
}

/// A migration away from here: each id is begun once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutgoingRecord {
    /// The migration, an operation's UUID.
    pub migration_id: String,
    /// Why the VMM refused to begin.
    pub error: Option<String>,
    /// The VMM that was told.
    pub pid: Option<u32>,
}

/// An order to save the guest, and why it was not obeyed. Each is tried once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRecord {
    /// The volume that it was to be saved to: each order has one of its own.
    pub memory: String,
    /// The assignment's epoch.
    pub epoch: u64,
    /// The assignment's start generation.
    pub start_generation: u64,
    /// In words.
    pub error: String,
}

impl DomainRecord {
    /// Reads a domain's record; `None` when it has none.
    pub fn load(files: &DomainFiles) -> Result<Option<Self>, Error> {
        load_json(&files.record, RECORD_VERSION)
    }

    /// Writes it durably; the domain's directory is made if it is not there.
    pub fn save(&self, files: &DomainFiles) -> Result<(), Error> {
        drover_storage::create_dir(&files.dir)?;
        save_json(&files.record, RECORD_VERSION, self)
    }
}

/// Reads a JSON record of exactly `version`.
pub(crate) fn load_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    version: u32,
) -> Result<Option<T>, Error> {
    let Some(record) = drover_storage::read(path)? else { return Ok(None) };
    let unreadable = |reason: String| Error::Record { path: path.to_owned(), reason };
    if record.version != version {
        return Err(unreadable(format!(
            "its version is {}, and this agent reads {version}",
            record.version
        )));
    }
    serde_json::from_slice(&record.payload).map(Some).map_err(|err| unreadable(err.to_string()))
}

/// Writes a JSON record.
pub(crate) fn save_json<T: Serialize>(path: &Path, version: u32, value: &T) -> Result<(), Error> {
    let json = serde_json::to_vec_pretty(value)
        .map_err(|err| Error::Record { path: path.to_owned(), reason: err.to_string() })?;
    Ok(drover_storage::write(path, version, &json)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11";

    fn places() -> (tempfile::TempDir, Places) {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { state: dir.path().join("state"), run: dir.path().join("run") };
        (dir, places)
    }

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let (_dir, places) = places();
        let files = places.domain(UID);
        assert_eq!(DomainRecord::load(&files).unwrap(), None);
        let record = DomainRecord {
            uid: UID.into(),
            name: "domains/web".into(),
            epoch: 7,
            run: Some(Run { epoch: 7, incoming: Some("m".into()), ..Run::default() }),
            end: Some(End {
                epoch: 6,
                incoming: None,
                ran: true,
                reason: EndReason::HostRebooted,
                detail: "d".into(),
                ordered: false,
                handover: Some(Handover { migration_id: "m0".into(), to_epoch: 7 }),
            }),
            start_generation: Some(3),
            crash_restarts: 1,
            outgoing: Some(OutgoingRecord { migration_id: "m0".into(), error: None, pid: Some(7) }),
            save: Some(SaveRecord {
                memory: "v".into(),
                epoch: 6,
                start_generation: 3,
                error: "e".into(),
            }),
            restored: Some("v".into()),
        };
        record.save(&files).unwrap();
        assert_eq!(DomainRecord::load(&files).unwrap(), Some(record));
        assert_eq!(places.domains().unwrap(), [UID]);
    }

    /// An agent before it could save guests wrote none of it down.
    #[test]
    fn an_earlier_agents_record_is_read() {
        let (_dir, places) = places();
        let files = places.domain(UID);
        let json = r#"{"uid":"u","name":"domains/web","epoch":7,"run":{"epoch":7,"incoming":null,
            "boot_id":"b","pid":9,"ran":true},"end":null,"start_generation":3,
            "crash_restarts":0,"outgoing":null}"#;
        drover_storage::create_dir(&files.dir).unwrap();
        drover_storage::write(&files.record, RECORD_VERSION, json.as_bytes()).unwrap();
        let record = DomainRecord::load(&files).unwrap().unwrap();
        assert_eq!((record.epoch, record.save, record.restored), (7, None, None));
        assert_eq!(record.run.unwrap().restore, None);
    }

    /// A damaged record is an error that names the file, and never "no record": the epoch in it
    /// is what keeps an old owner from running the domain.
    #[test]
    fn a_damaged_record_is_an_error() {
        let (_dir, places) = places();
        let files = places.domain(UID);
        DomainRecord { uid: UID.into(), epoch: 9, ..DomainRecord::default() }.save(&files).unwrap();
        let whole = fs::read(&files.record).unwrap();
        for bytes in [&whole[..0], &whole[..10], &whole[..whole.len() - 1]] {
            fs::write(&files.record, bytes).unwrap();
            let err = DomainRecord::load(&files).unwrap_err().to_string();
            assert!(err.contains(UID) && err.contains("damaged"), "{err}");
        }
        drover_storage::write(&files.record, RECORD_VERSION, b"[]").unwrap();
        assert!(DomainRecord::load(&files).is_err());
        drover_storage::write(&files.record, 99, b"{}").unwrap();
        let err = DomainRecord::load(&files).unwrap_err().to_string();
        assert!(err.contains("version is 99"), "{err}");
    }
}
