//! `vpsctl backup`: what is read of a cluster goes into a directory of this machine, and back.
//!
//! All of it is done here, with calls that any client may make: a snapshot is taken, read and
//! deleted (`create`); an image is made of the blocks, put in place of a disk and deleted
//! (`restore`). `crate::backup` has the directory.

mod create;
mod restore;
mod stream;

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::Instant,
};

use super::Context;
use crate::{
    args::BackupCommand,
    backup::{BLOCK_BYTES, BlockError, Digest, Directory, Manifest, ManifestDisk},
    error::{Broken, Error},
    out::{
        human::{plural, size, time},
        json::values,
        pages::{self, Verified},
    },
    transfer::Transfer,
};

pub(super) async fn run(context: &Context, command: BackupCommand) -> Result<(), Error> {
    match command {
        BackupCommand::Create(args) => create::run(context, args).await,
        BackupCommand::List(directory) => list(context, &directory.directory),
        BackupCommand::Restore(args) => restore::run(context, args).await,
        BackupCommand::Delete { directory, name } => {
            delete(context, &directory.directory, &name.backup)
        }
        BackupCommand::Verify { directory, backup, remove_damaged } => {
            verify(context, directory.directory, backup, remove_damaged).await
        }
    }
}

fn list(context: &Context, path: &Path) -> Result<(), Error> {
    let (manifests, broken) = Directory::look(path)?.manifests()?;
    context.answer(
        || Ok(values(manifests.iter().map(Manifest::view).collect())),
        || pages::backups(&manifests),
    )?;
    all_readable(broken)
}

/// What could be read has been shown; the rest is an error all the same.
fn all_readable(broken: Vec<Error>) -> Result<(), Error> {
    match broken.as_slice() {
        [] => Ok(()),
        broken => {
            let lines: Vec<_> = broken.iter().map(ToString::to_string).collect();
            Err(Error::Local(lines.join("\nerror: ")))
        }
    }
}

fn delete(context: &Context, path: &Path, name: &str) -> Result<(), Error> {
    let freed = Directory::change(path)?.delete(name)?;
    let json = || Ok(format!("{}\n", serde_json::json!({ "name": name, "freed_bytes": freed })));
    context.answer(json, || format!("{name} is deleted, which gave {} back\n", size(freed)))
}

/// Reads every block once, whatever number of backups need it.
async fn verify(
    context: &Context,
    path: PathBuf,
    backup: Option<String>,
    remove_damaged: bool,
) -> Result<(), Error> {
    let directory =
        if remove_damaged { Directory::change(&path)? } else { Directory::read(&path)? };
    let (manifests, broken) = match backup {
        Some(name) => (vec![directory.manifest(&name)?], Vec::new()),
        None => directory.manifests()?,
    };
    let damaged = until_stopped(context, "the check", damaged(&directory, &manifests)).await?;
    let verified: Vec<_> = manifests.iter().map(|manifest| of_one(manifest, &damaged)).collect();
    context.answer(
        || Ok(values(verified.iter().map(Verified::view).collect())),
        || pages::verified(&verified),
    )?;
    if remove_damaged {
        for (digest, _) in damaged.iter().filter(|(_, e)| matches!(e, BlockError::Damaged(_))) {
            directory.blocks.remove(digest)?;
        }
    }
    all_readable(broken)?;
    match damaged.len() {
        0 => Ok(()),
        1 => Err(Error::Local("1 block is damaged or missing".to_owned())),
        number => Err(Error::Local(format!("{number} blocks are damaged or missing"))),
    }
}

type Damaged = BTreeMap<Digest, BlockError>;

async fn damaged(directory: &Directory, manifests: &[Manifest]) -> Result<Damaged, Error> {
    let disks = || manifests.iter().flat_map(|manifest| &manifest.disks);
    let digests: HashSet<_> = disks().flat_map(ManifestDisk::digests).collect();
    let mut damaged = BTreeMap::new();
    let mut progress = Transfer::new(plural(manifests.len(), "backup"), "read");
    let total = (digests.len() * BLOCK_BYTES) as u64;
    for (index, digest) in digests.into_iter().enumerate() {
        progress.update((index * BLOCK_BYTES) as u64, total);
        let blocks = directory.blocks.clone();
        let read = blocking(move || Ok(blocks.get(&digest).map(|_| ()))).await?;
        if let Err(error) = read {
            damaged.insert(digest, error);
        }
    }
    Ok(damaged)
}

fn of_one(manifest: &Manifest, damaged: &Damaged) -> Verified {
    let digests = manifest.disks.iter().flat_map(ManifestDisk::digests);
    let bad: BTreeMap<_, _> = digests
        .filter_map(|digest| Some((digest.to_string(), damaged.get(&digest)?.to_string())))
        .collect();
    Verified {
        name: manifest.name.clone(),
        block_count: manifest.block_count(),
        damaged: bad.into_iter().collect(),
    }
}

/// Runs something that reads or writes files on a thread that may wait for them.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(Error::Local(format!("a thread of this process ended: {e}"))))
}

/// Work up to its end, a signal or `--timeout`. The caller cleans up afterwards, whatever the end:
/// so a terminal that goes away, or a service manager that ends the process, counts as Ctrl-C.
async fn until_stopped<T>(
    context: &Context,
    what: &str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let catch = |kind| signal(kind).map_err(|e| Error::Local(format!("cannot catch signals: {e}")));
    let mut interrupt = catch(SignalKind::interrupt())?;
    let mut terminate = catch(SignalKind::terminate())?;
    let mut hang_up = catch(SignalKind::hangup())?;
    let started = Instant::now();
    let broken = |how| Err(Error::Broken { what: what.to_owned(), how });
    // In this order: what is waited for within would tell of the same signal in its own words.
    tokio::select! {
        biased;
        _ = interrupt.recv() => broken(Broken::Interrupted),
        _ = terminate.recv() => broken(Broken::Interrupted),
        _ = hang_up.recv() => broken(Broken::Interrupted),
        () = context.cluster.deadline_passed() => {
            broken(Broken::Timeout(time(started.elapsed())))
        }
        done = work => done,
    }
}
