//! `vpsctl backup restore`: the blocks of a disk become an image, the image the disk's content.
//!
//! All images are there, and compared with the digests of the backup, before the first disk is
//! touched; and each disk has its old content or its new one, never a part of both.

use std::{
    cell::RefCell,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use drover_proto::v1::{
    DeleteImageRequest, Disk, Domain, DomainState, ImageFormat, ImportImageSpec,
    ReinstallDomainRequest, domain_service_client::DomainServiceClient,
    image_service_client::ImageServiceClient,
};
use tonic::Code;

use super::{Context, blocking, until_stopped};
use crate::{
    args::RestoreBackupArgs,
    backup::{BLOCK_BYTES, Blocks, Digest, Directory, ImageDigester, Manifest},
    commands::{
        ask::confirm,
        call,
        domain::get,
        files::CHUNK_BYTES,
        import::{Source, sent},
        request_id,
    },
    error::Error,
    out::human::{enum_name, plural, short, size},
    wait,
};

/// So long the images' end is tried: longer than an election.
const CLEAN_UP_TIME_MAX: Duration = Duration::from_secs(60);

pub(super) async fn run(context: &Context, args: RestoreBackupArgs) -> Result<(), Error> {
    let path = &args.directory.directory;
    let directory = Directory::read(path)?;
    let manifest = directory.manifest(&args.name.backup)?;
    let places = places(&manifest, args.disk)?;
    let domain = get(context, &args.domain.domain).await?;
    fits(&domain, &manifest, &places)?;
    all_there(path, &directory, &manifest, &places)?;
    let id = short(&domain.name);
    let disks = named(&places);
    confirm(args.yes, &format!("what {disks} of {id} holds now is lost"))?;

    let work =
        Work { context, domain: &domain, images: RefCell::default(), state: RefCell::default() };
    let what = format!("the restore of {id}");
    let done = until_stopped(context, &what, work.run(&directory, &manifest, &places)).await;
    let gone = work.images_gone().await;
    if let Err(error) = done {
        work.say_where_it_is(&places);
        if let Err(left) = gone {
            eprintln!("error: {left}");
        }
        return Err(error);
    }
    let json = || {
        let view = serde_json::json!({
            "name": domain.name, "backup": manifest.name, "disks": places,
        });
        Ok(format!("{view:#}\n"))
    };
    let page = || format!("{disks} of {id} {} what {} has\n", hold(&places), manifest.name);
    context.answer(json, page)?;
    gone
}

/// `disk 0`, `disks 0 and 1`.
fn named(places: &[usize]) -> String {
    let numbers: Vec<_> = places.iter().map(usize::to_string).collect();
    match numbers.as_slice() {
        [one] => format!("disk {one}"),
        [first @ .., last] => format!("disks {} and {last}", first.join(", ")),
        [] => "no disk".to_owned(),
    }
}

fn hold(places: &[usize]) -> &'static str {
    if places.len() == 1 { "holds" } else { "hold" }
}

fn places(manifest: &Manifest, disk: Option<u32>) -> Result<Vec<usize>, Error> {
    let count = manifest.disks.len();
    let Some(disk) = disk else { return Ok((0..count).collect()) };
    match usize::try_from(disk) {
        Ok(place) if place < count => Ok(vec![place]),
        _ => Err(Error::Usage(format!(
            "--disk: {disk} is not in backup {}, which has {}, counted from 0",
            manifest.name,
            plural(count, "disk")
        ))),
    }
}

/// The domain is at rest and has a disk for each, large enough.
fn fits(domain: &Domain, manifest: &Manifest, places: &[usize]) -> Result<(), Error> {
    let id = short(&domain.name);
    match domain.state() {
        DomainState::Stopped | DomainState::Failed => {}
        DomainState::Saved => {
            return Err(Error::Conflict(format!(
                "{id} is saved, and what was saved needs its disks as they are: start it (with \
                 --discard-saved, or as it was) and stop it first"
            )));
        }
        state => {
            let state = enum_name(state.as_str_name(), "DOMAIN_STATE_");
            return Err(Error::Conflict(format!(
                "{id} is {state}: only a stopped domain can be restored"
            )));
        }
    }
    let disks = domain.spec.as_ref().map(|spec| spec.disks.as_slice()).unwrap_or_default();
    for place in places {
        let Some(disk) = disks.get(*place) else {
            return Err(Error::Conflict(format!(
                "{id} has {}, so there is none for disk {place} of the backup: --disk N restores \
                 one of them",
                plural(disks.len(), "disk")
            )));
        };
        let needed = manifest.disks[*place].size_bytes;
        if disk.size_bytes > 0 && disk.size_bytes < needed {
            return Err(Error::Conflict(format!(
                "disk {place} of {id} has {}, the backup's {}: vpsctl domain resize {id} --disk \
                 {place}={needed}",
                size(disk.size_bytes),
                size(needed)
            )));
        }
    }
    Ok(())
}

/// What is missing is seen before anything is sent; what is damaged, when it is read.
fn all_there(
    path: &Path,
    directory: &Directory,
    manifest: &Manifest,
    places: &[usize],
) -> Result<(), Error> {
    let digests = places.iter().flat_map(|place| manifest.disks[*place].digests());
    match digests.filter(|digest| !directory.blocks.has(digest)).count() {
        0 => Ok(()),
        missing => Err(Error::Local(format!(
            "backup {} is not whole: {} missing (vpsctl backup verify {} {})",
            manifest.name,
            if missing == 1 { "1 block is".to_owned() } else { format!("{missing} blocks are") },
            path.display(),
            manifest.name
        ))),
    }
}

#[derive(Default)]
struct State {
    /// The disks that hold the backup.
    done: Vec<usize>,
    /// The disk and the operation under way, and the image that it needs.
    under_way: Option<(usize, String, String)>,
}

struct Work<'a> {
    context: &'a Context,
    domain: &'a Domain,
    /// The images that were asked for.
    images: RefCell<Vec<String>>,
    state: RefCell<State>,
}

impl Work<'_> {
    async fn run(
        &self,
        directory: &Directory,
        manifest: &Manifest,
        places: &[usize],
    ) -> Result<(), Error> {
        let mut made = Vec::new();
        for place in places {
            made.push((*place, self.image(directory, manifest, *place).await?));
        }
        for (place, image) in made {
            self.reinstall(place, image).await?;
        }
        Ok(())
    }

    /// Makes an image of a disk's blocks, on the node and in the pool where it is needed.
    async fn image(
        &self,
        directory: &Directory,
        manifest: &Manifest,
        place: usize,
    ) -> Result<String, Error> {
        let disk = &manifest.disks[place];
        let blocks = disk.blocks();
        let assembled = Arc::new(Assembled::new(&directory.blocks, blocks, disk.size_bytes, place));
        let expected = {
            let assembled = assembled.clone();
            blocking(move || assembled.digest()).await?
        };
        let name = format!("images/restore-{}", uuid::Uuid::new_v4().simple());
        let disks = self.domain.spec.as_ref().map(|spec| spec.disks.as_slice());
        let mut spec = ImportImageSpec {
            name: name.clone(),
            node: self.domain.node.clone(),
            pool: disks.and_then(|disks| disks.get(place)).map(pool_of).unwrap_or_default(),
            file_bytes: disk.size_bytes,
            request_id: request_id(),
            ..ImportImageSpec::default()
        };
        spec.set_format(ImageFormat::Raw);
        // Before it is asked for: an answer may be lost.
        self.images.borrow_mut().push(name.clone());
        let title = format!("disk {place} of {}", manifest.name);
        let image = sent(self.context, &spec, Some(assembled), title).await?;
        if (image.digest.as_str(), image.size_bytes) == (expected.as_str(), disk.size_bytes) {
            return Ok(name);
        }
        Err(Error::Local(format!(
            "disk {place}: what arrived is not what was sent: an image of {} bytes and digest {}, \
             where {} bytes and {expected} are expected",
            image.size_bytes, image.digest, disk.size_bytes
        )))
    }

    async fn reinstall(&self, place: usize, image: String) -> Result<(), Error> {
        let request = ReinstallDomainRequest {
            name: self.domain.name.clone(),
            request_id: request_id(),
            disk: u32::try_from(place).unwrap_or(u32::MAX),
            image: image.clone(),
            // It is deleted afterwards: the disk must not be said to be made of it.
            keep_image: true,
        };
        let under_way = |operation: &str| Some((place, operation.to_owned(), image.clone()));
        self.state.borrow_mut().under_way = under_way("");
        let operation = match call!(self.context, DomainServiceClient::reinstall_domain, request) {
            Ok(operation) => operation,
            Err(error) => {
                // A refusal has started nothing; of a lost answer nobody knows.
                if matches!(error, Error::Refused(_)) {
                    self.state.borrow_mut().under_way = None;
                }
                return Err(error);
            }
        };
        self.state.borrow_mut().under_way = under_way(&operation.name);
        let operation = wait::finished(&self.context.cluster, operation).await?;
        self.state.borrow_mut().under_way = None;
        wait::succeeded(operation)?;
        self.state.borrow_mut().done.push(place);
        Ok(())
    }

    /// Where it was left: the disks of a domain that has several should be of one moment.
    fn say_where_it_is(&self, places: &[usize]) {
        let state = self.state.borrow();
        let id = short(&self.domain.name);
        if let Some((place, operation, image)) = &state.under_way {
            let (operation, image) = (short(operation), short(image));
            eprintln!("disk {place} of {id} may still be put back, which needs image {image}");
            eprintln!("hint: vpsctl operation wait {operation}; vpsctl image delete {image}");
        }
        if !state.done.is_empty() {
            let rest: Vec<_> = places.iter().copied().filter(|p| !state.done.contains(p)).collect();
            eprintln!(
                "{} of {id} {} the backup, {} not: restore again before it is started",
                named(&state.done),
                hold(&state.done),
                named(&rest)
            );
        }
    }

    /// Deletes the images, but for one that an operation still needs.
    async fn images_gone(&self) -> Result<(), Error> {
        let needed = self.state.borrow().under_way.as_ref().map(|(_, _, image)| image.clone());
        let context =
            Context { cluster: self.context.cluster.for_clean_up(CLEAN_UP_TIME_MAX), json: false };
        let mut left = Ok(());
        for name in self.images.take().into_iter().filter(|name| Some(name) != needed.as_ref()) {
            let request = DeleteImageRequest {
                name: name.clone(),
                etag: String::new(),
                request_id: request_id(),
            };
            match call!(context, ImageServiceClient::delete_image, request) {
                Ok(_) => {}
                Err(Error::Refused(status)) if status.code() == Code::NotFound => {}
                Err(error) => {
                    let id = short(&name);
                    left = Err(Error::Local(format!(
                        "image {id} could not be deleted: {error}\nhint: vpsctl image delete {id}"
                    )));
                }
            }
        }
        left
    }
}

fn pool_of(disk: &Disk) -> String {
    disk.pool.clone()
}

/// A disk as the file that it would be.
struct Assembled {
    blocks: Blocks,
    digests: Vec<Option<Digest>>,
    bytes: u64,
    place: usize,
    /// Two chunks are read of each block.
    last: Mutex<Option<(usize, Vec<u8>)>>,
}

impl Assembled {
    fn new(blocks: &Blocks, digests: Vec<Option<Digest>>, bytes: u64, place: usize) -> Self {
        Self { blocks: blocks.clone(), digests, bytes, place, last: Mutex::default() }
    }

    fn block(&self, index: usize, digest: &Digest) -> Result<Vec<u8>, Error> {
        self.blocks.get(digest).map_err(|e| {
            let path = self.blocks.path(digest);
            Error::Local(format!(
                "disk {}: block {index}, \"{}\", {e}: nothing was changed",
                self.place,
                path.display()
            ))
        })
    }

    /// What the API will call the image, if all arrives.
    fn digest(&self) -> Result<String, Error> {
        let zeros = vec![0; BLOCK_BYTES];
        let zero = Digest::of(&zeros);
        let rest = (self.bytes % BLOCK_BYTES as u64) as usize;
        let mut list = ImageDigester::new(self.bytes);
        for (index, digest) in self.digests.iter().enumerate() {
            let is_short = rest > 0 && index + 1 == self.digests.len();
            let digest = match digest {
                Some(digest) if is_short => Digest::of(&self.block(index, digest)?[..rest]),
                None if is_short => Digest::of(&zeros[..rest]),
                Some(digest) => *digest,
                None => zero,
            };
            list.block(&digest);
        }
        Ok(list.finish())
    }
}

impl Source for Assembled {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn chunk(&self, offset: u64) -> Result<Vec<u8>, Error> {
        let index = (offset / BLOCK_BYTES as u64) as usize;
        let within = (offset % BLOCK_BYTES as u64) as usize;
        let length =
            (self.bytes - offset).min(CHUNK_BYTES.min(BLOCK_BYTES - within) as u64) as usize;
        let Some(digest) = self.digests.get(index).copied().flatten() else {
            return Ok(vec![0; length]);
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let data = match last.take().filter(|(held, _)| *held == index) {
            Some((_, data)) => data,
            None => self.block(index, &digest)?,
        };
        let chunk = data[within..within + length].to_vec();
        *last = Some((index, data));
        Ok(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The stream is the disk, zeros and a short end included, and has the image's digest.
    #[test]
    fn a_disk_is_put_together() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::make(&folder.path().join("b")).unwrap();
        let data: Vec<u8> = (0..BLOCK_BYTES).map(|n| (n % 251) as u8).collect();
        let mut tail = vec![9; 512];
        tail.resize(BLOCK_BYTES, 0);
        let (first, last) = (Digest::of(&data), Digest::of(&tail));
        directory.blocks.put(&first, &data).unwrap();
        directory.blocks.put(&last, &tail).unwrap();
        let bytes = 3 * BLOCK_BYTES as u64 + 512;
        let digests = vec![Some(first), None, Some(first), Some(last)];
        let disk = Assembled::new(&directory.blocks, digests, bytes, 0);
        let mut whole = Vec::new();
        while (whole.len() as u64) < bytes {
            whole.extend(disk.chunk(whole.len() as u64).unwrap());
        }
        assert!(whole == [&data[..], &vec![0; BLOCK_BYTES], &data, &[9; 512]].concat());
        // As `storage/src/image/digest.rs` has the rule.
        let lines: String =
            whole.chunks(BLOCK_BYTES).map(|c| format!("{}\n", Digest::of(c))).collect();
        let expected = Digest::of(format!("drover-image-1 {bytes}\n{lines}").as_bytes());
        assert_eq!(disk.digest().unwrap(), expected.to_string());
    }

    #[test]
    fn disks_are_named() {
        assert_eq!(named(&[0]), "disk 0");
        assert_eq!(named(&[0, 1, 2]), "disks 0, 1 and 2");
    }
}
