//! `vpsctl backup create`.
//!
//! The order is what makes it safe: a snapshot; its blocks, each durable before it counts; the
//! manifest, which names them; then the snapshot goes. Whatever ends this before, the snapshot goes
//! too, and the directory holds blocks that nobody names.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime},
};

use drover_proto::v1::{
    CancelOperationRequest, CreateSnapshotRequest, Domain, Snapshot, SnapshotDisk, SnapshotState,
    operation_service_client::OperationServiceClient,
    snapshot_service_client::SnapshotServiceClient,
};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Status};

use super::{
    Context, blocking,
    stream::{Reader, Said, messages},
    until_stopped,
};
use crate::{
    args::CreateBackupArgs,
    backup::{BLOCK_BYTES, Digest, Directory, Manifest, ManifestDisk},
    client::{MESSAGE_BYTES_MAX, root_cause},
    commands::{call, domain::get, request_id, snapshot},
    error::{Broken, Error},
    out::{
        human::{short, time},
        pages,
    },
    transfer::Transfer,
    wait,
};

/// So many blocks are packed and written at once, each on a thread of its own.
const WRITERS_MAX: usize = 4;
/// A controller that says nothing for so long is given up: where a node reads only zeros, it says
/// so every few seconds. The controller itself is less patient, and says more.
const SILENCE_MAX: Duration = Duration::from_secs(180);
/// A disk's stream may break so often. What had come over by then does not come again.
const BREAKS_MAX: u32 = 10;
const BREAK_PAUSE: Duration = Duration::from_secs(1);
/// A node reads so many disks at once and no more: others' backups may take a while.
const BUSY_TIME_MAX: Duration = Duration::from_secs(1800);
const BUSY_PAUSE: Duration = Duration::from_secs(2);
/// So long the snapshot's end is tried: longer than an election and than taking it may last.
const CLEAN_UP_TIME_MAX: Duration = Duration::from_secs(60);
const CLEAN_UP_PAUSE: Duration = Duration::from_millis(500);

pub(super) async fn run(context: &Context, args: CreateBackupArgs) -> Result<(), Error> {
    let domain = get(context, &args.domain.domain).await?;
    let id = short(&domain.name);
    if domain.spec.as_ref().is_none_or(|spec| spec.disks.is_empty()) {
        return Err(Error::Conflict(format!("{id} has no disks: there is nothing to back up")));
    }
    let directory = Directory::make(&args.directory.directory)?;
    if let Some(name) = &args.name
        && directory.names()?.contains(name)
    {
        return Err(Error::Conflict(format!("backup {name} exists already")));
    }
    let temporary = Temporary::new();
    let work = Work {
        context,
        domain: &domain,
        directory: &directory,
        snapshot: &temporary,
        received_bytes: Cell::new(0),
        added_blocks: Cell::new(0),
    };
    let made = until_stopped(context, &format!("the backup of {id}"), work.run(args.name)).await;
    let gone = temporary.end(context).await;
    let manifest = match (made, gone) {
        (Ok(manifest), gone) => {
            work.answer(&manifest)?;
            return gone;
        }
        (Err(error), Ok(())) => return Err(error),
        (Err(error), Err(left)) => {
            eprintln!("error: {left}");
            error
        }
    };
    Err(manifest)
}

/// The snapshot that is taken to be read. It has a name that nobody else chooses.
struct Temporary {
    name: String,
    asked: Cell<bool>,
    /// What takes it, while it may be under way.
    operation: RefCell<String>,
}

impl Temporary {
    fn new() -> Self {
        let name = format!("snapshots/backup-{}", uuid::Uuid::new_v4().simple());
        Self { name, asked: Cell::new(false), operation: RefCell::default() }
    }

    async fn take(&self, context: &Context, domain: &str) -> Result<Snapshot, Error> {
        let request = CreateSnapshotRequest {
            name: self.name.clone(),
            domain: domain.to_owned(),
            request_id: request_id(),
        };
        // Before it is asked for: an answer may be lost.
        self.asked.set(true);
        let operation = call!(context, SnapshotServiceClient::create_snapshot, request)?;
        self.operation.replace(operation.name.clone());
        wait::succeeded(wait::finished(&context.cluster, operation).await?)?;
        self.operation.take();
        let taken = snapshot::get(context, &self.name).await?;
        match taken.state() {
            SnapshotState::Ready => Ok(taken),
            _ => Err(Error::Local(format!(
                "snapshot {} cannot be read: {}",
                short(&self.name),
                taken.state_reason
            ))),
        }
    }

    /// Deletes it, also when it is still being taken, and whatever has ended the backup.
    async fn end(&self, context: &Context) -> Result<(), Error> {
        if !self.asked.get() {
            return Ok(());
        }
        let context =
            Context { cluster: context.cluster.for_clean_up(CLEAN_UP_TIME_MAX), json: false };
        let until = Instant::now() + CLEAN_UP_TIME_MAX;
        let operation = self.operation.take();
        if !operation.is_empty() {
            let request = CancelOperationRequest { name: operation };
            // One that cannot be cancelled will be done soon.
            let _ = call!(context, OperationServiceClient::cancel_operation, request);
        }
        loop {
            let error = match snapshot::delete(&context, &self.name).await {
                Ok(()) => return Ok(()),
                Err(Error::Refused(status)) if status.code() == Code::NotFound => return Ok(()),
                Err(error) => error,
            };
            let busy = matches!(&error, Error::Refused(status)
                if matches!(status.code(), Code::FailedPrecondition | Code::Aborted));
            if !busy || Instant::now() >= until {
                let id = short(&self.name);
                return Err(Error::Local(format!(
                    "the backup's snapshot could not be deleted: {error}\n\
                     hint: vpsctl snapshot delete {id} --yes"
                )));
            }
            sleep(CLEAN_UP_PAUSE).await;
        }
    }
}

struct Work<'a> {
    context: &'a Context,
    domain: &'a Domain,
    directory: &'a Directory,
    snapshot: &'a Temporary,
    /// Of blocks' data that came over.
    received_bytes: Cell<u64>,
    /// That the directory did not have.
    added_blocks: Cell<u64>,
}

impl Work<'_> {
    async fn run(&self, name: Option<String>) -> Result<Manifest, Error> {
        let before = self.newest()?;
        let snapshot = self.snapshot.take(self.context, &self.domain.name).await?;
        let taken = snapshot.create_time.unwrap_or_else(|| SystemTime::now().into());
        let mut manifest = Manifest::new(
            name.unwrap_or_else(|| name_of(&self.domain.name, &taken)),
            self.domain,
            &taken,
            snapshot.quiesced,
        );
        let total = snapshot.disks.iter().map(|disk| disk.size_bytes).sum();
        let title = format!("backup {}", short(&self.domain.name));
        let mut shown = Shown { progress: Transfer::new(title, "read"), before: 0, total };
        for (place, disk) in snapshot.disks.iter().enumerate() {
            let known = self.known(before.as_ref(), disk).await?;
            let disk = self.disk(place, disk, known, &mut shown).await?;
            shown.before += disk.size_bytes;
            manifest.disks.push(disk);
        }
        self.directory.add(&manifest)?;
        Ok(manifest)
    }

    /// The domain's newest backup here: most of its blocks will be the same.
    fn newest(&self) -> Result<Option<Manifest>, Error> {
        let (mut manifests, broken) = self.directory.manifests()?;
        for error in broken {
            eprintln!("not used: {error}");
        }
        manifests.retain(|manifest| manifest.domain == self.domain.name);
        Ok(manifests.pop())
    }

    /// What a disk held at the newest backup, as far as its blocks are still there.
    async fn known(
        &self,
        before: Option<&Manifest>,
        disk: &SnapshotDisk,
    ) -> Result<Vec<Option<Digest>>, Error> {
        let same = |old: &&ManifestDisk| old.volume == disk.volume;
        let old = before.and_then(|manifest| manifest.disks.iter().find(same));
        let mut known = old.map(ManifestDisk::blocks).unwrap_or_default();
        let blocks = self.directory.blocks.clone();
        blocking(move || {
            for digest in &mut known {
                *digest = digest.filter(|digest| blocks.has(digest));
            }
            Ok(known)
        })
        .await
    }

    /// One disk, through as many streams as it takes.
    async fn disk(
        &self,
        place: usize,
        disk: &SnapshotDisk,
        mut known: Vec<Option<Digest>>,
        shown: &mut Shown,
    ) -> Result<ManifestDisk, Error> {
        // A domain made anew under the name may have a smaller disk.
        known.truncate(usize::try_from(disk.size_bytes.div_ceil(BLOCK_BYTES as u64)).unwrap_or(0));
        let lost = |how| {
            let what = format!("the backup of {}", short(&self.domain.name));
            Err(Error::Broken { what, how: Broken::Lost(how) })
        };
        let mut breaks = 0;
        let mut busy_since = None;
        loop {
            match self.stream(place, &mut known, shown).await? {
                Ended::Whole { size_bytes, blocks } => {
                    return Ok(ManifestDisk::new(&disk.volume, &disk.pool, size_bytes, &blocks));
                }
                Ended::Busy(how) => {
                    let since = *busy_since.get_or_insert_with(|| {
                        eprintln!("disk {place}: {how}: waiting");
                        Instant::now()
                    });
                    if since.elapsed() > BUSY_TIME_MAX {
                        return lost(how);
                    }
                    sleep(BUSY_PAUSE).await;
                }
                Ended::Broken(how) if breaks == BREAKS_MAX => return lost(how),
                Ended::Broken(how) => {
                    eprintln!("disk {place}: the stream broke ({how}): going on");
                    breaks += 1;
                    sleep(BREAK_PAUSE).await;
                }
            }
        }
    }

    /// One stream. What it brings is known to the next.
    async fn stream(
        &self,
        place: usize,
        known: &mut Vec<Option<Digest>>,
        shown: &mut Shown,
    ) -> Result<Ended, Error> {
        let said = Arc::new(known.clone());
        let open = |rpc| {
            let messages = messages(&self.snapshot.name, place, said.clone());
            async move {
                let client = SnapshotServiceClient::new(rpc);
                client.max_decoding_message_size(MESSAGE_BYTES_MAX).read_snapshot(messages).await
            }
        };
        let mut answers = match self.context.cluster.call_again(open).await {
            Ok(answers) => answers,
            Err(Error::Refused(status)) => return self.ended_by(*status),
            Err(error) => return Err(error),
        };
        let mut reader = Reader { place, said: &said, size_bytes: None, next: 0 };
        let mut blocks = Vec::new();
        let mut writers = VecDeque::new();
        let end = loop {
            let answer = match timeout(SILENCE_MAX, answers.message()).await {
                Ok(Ok(Some(answer))) => answer,
                Ok(Ok(None)) => break None,
                Ok(Err(status)) => break Some(self.ended_by(status)?),
                Err(_) => {
                    break Some(Ended::Broken(format!("{} without a word", time(SILENCE_MAX))));
                }
            };
            let block = match reader.take(answer).map_err(Error::Local)? {
                Said::Size => {
                    let count = reader.block_total();
                    blocks = vec![None; count];
                    known.resize(count, None);
                    continue;
                }
                Said::Zeros { until } => {
                    shown.at(until);
                    continue;
                }
                Said::Block(block) => block,
            };
            blocks[block.index] = Some(block.digest);
            shown.at(((block.index + 1) * BLOCK_BYTES) as u64);
            if block.data.is_empty() {
                continue;
            }
            self.received_bytes.set(self.received_bytes.get() + block.data.len() as u64);
            let (index, digest) = (block.index, block.digest);
            // The same content at another place, and on its way: once is enough.
            if writers.iter().any(|writer: &Writer| writer.digest == digest) {
                known[index] = Some(digest);
                continue;
            }
            if writers.len() == WRITERS_MAX {
                self.written(&mut writers, known).await?;
            }
            let directory = self.directory.blocks.clone();
            let task = tokio::task::spawn_blocking(move || {
                directory.put(&block.digest, &block.whole(place)?)
            });
            writers.push_back(Writer { index, digest, task });
        };
        while !writers.is_empty() {
            self.written(&mut writers, known).await?;
        }
        Ok(match (end, reader.size_bytes) {
            (Some(end), _) => end,
            (None, Some(size_bytes)) => Ended::Whole { size_bytes, blocks },
            (None, None) => {
                let text = format!("disk {place}: the controller ended its stream without a word");
                return Err(Error::Local(text));
            }
        })
    }

    /// What a status means: try again, or a refusal.
    fn ended_by(&self, status: Status) -> Result<Ended, Error> {
        self.context.cluster.turn_after(&status);
        match status.code() {
            Code::ResourceExhausted => Ok(Ended::Busy(status.message().to_owned())),
            // Between the node and here there may be a member or two, each of which can be gone.
            Code::Unavailable
            | Code::Unknown
            | Code::Internal
            | Code::Cancelled
            | Code::Aborted
            | Code::DeadlineExceeded => Ok(Ended::Broken(root_cause(&status))),
            _ => Err(status.into()),
        }
    }

    /// Waits for the block that was given to a thread first.
    async fn written(
        &self,
        writers: &mut VecDeque<Writer>,
        known: &mut [Option<Digest>],
    ) -> Result<(), Error> {
        let Some(writer) = writers.pop_front() else { return Ok(()) };
        let added = writer
            .task
            .await
            .unwrap_or_else(|e| Err(Error::Local(format!("writing a block: {e}"))))?;
        known[writer.index] = Some(writer.digest);
        self.added_blocks.set(self.added_blocks.get() + u64::from(added));
        Ok(())
    }

    fn answer(&self, manifest: &Manifest) -> Result<(), Error> {
        let (received, added) = (self.received_bytes.get(), self.added_blocks.get());
        let json = || {
            let mut view = manifest.view();
            view["received_bytes"] = received.into();
            view["added_blocks"] = added.into();
            Ok(format!("{view:#}\n"))
        };
        self.context.answer(json, || pages::backed_up(manifest, received, added))
    }
}

/// How a disk's stream ended.
enum Ended {
    Whole {
        size_bytes: u64,
        blocks: Vec<Option<Digest>>,
    },
    Broken(String),
    /// The node has others to read for.
    Busy(String),
}

/// A block on its way to its file.
struct Writer {
    index: usize,
    digest: Digest,
    task: JoinHandle<Result<bool, Error>>,
}

/// How far all disks are.
struct Shown {
    progress: Transfer,
    /// Of the disks that are done.
    before: u64,
    total: u64,
}

impl Shown {
    fn at(&mut self, bytes: u64) {
        self.progress.update((self.before + bytes).min(self.total), self.total);
    }
}

/// `web1-20261123-011600`.
fn name_of(domain: &str, taken: &prost_types::Timestamp) -> String {
    let digits: String = taken.to_string().chars().filter(char::is_ascii_digit).take(14).collect();
    let (day, time) = digits.split_at(digits.len().min(8));
    format!("{}-{day}-{time}", short(domain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_called_after_its_moment() {
        let taken = prost_types::Timestamp { seconds: 1_700_000_000, nanos: 500_000_000 };
        assert_eq!(name_of("domains/web1", &taken), "web1-20231114-221320");
    }
}
