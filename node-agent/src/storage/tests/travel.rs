//! Volumes that are read, and copied from one agent to another: over connections that break, from
//! sources that lie, and through restarts.

use std::pin::Pin;
use std::sync::atomic::AtomicUsize;

use drover_proto::agent::v1::agent_service_server::{AgentService, AgentServiceServer};
use drover_proto::agent::v1::{
    CallGuestRequest, CallGuestResponse, ReadVolumeRequest, VolumeSource, read_volume_request,
};
use drover_proto::v1::{ConsoleInput, KnownBlocks, ReadSnapshotResponse};
use drover_storage::image::chunk_digest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::{Request, Response, Streaming};

use super::serve::{Known, give_out};
use super::*;

/// A node whose volume 1 begins with [`content`].
async fn source() -> Node {
    let node = node().await;
    node.want(vec![blank(1)], vec![]).await;
    node.until_ready(1).await;
    let path = node.handle.activate("main", &uid(1)).unwrap();
    let mut data = content();
    data.resize(8 * MIB, 0);
    std::fs::write(path, data).unwrap();
    node
}

fn copied(from: impl ToString) -> WantedVolume {
    WantedVolume { copy_from: from.to_string(), ..blank(1) }
}

fn lock(node: &Node, n: u8) -> Option<std::fs::File> {
    let path = node.handle.activate("main", &uid(n)).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let locked = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    locked.is_ok().then_some(file)
}

fn volume(n: u8) -> ReadVolumeRequest {
    let source = VolumeSource { volume_uid: uid(n), pool: "main".into(), ..Default::default() };
    ReadVolumeRequest { message: Some(read_volume_request::Message::Volume(source)) }
}

fn known(first_block: u64, digests: Vec<u8>) -> ReadVolumeRequest {
    let known = KnownBlocks { first_block, digests: digests.into() };
    ReadVolumeRequest { message: Some(read_volume_request::Message::Known(known)) }
}

async fn read(
    node: &Node,
    requests: Vec<ReadVolumeRequest>,
) -> Result<Vec<ReadSnapshotResponse>, Status> {
    let answer = node.client().await.read_volume(tokio_stream::iter(requests)).await?;
    let mut stream = answer.into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

fn reason(view: &View) -> &str {
    view.volumes.iter().find(|v| v.uid == uid(1)).map_or("", |v| &v.state_reason)
}

impl Node {
    async fn until_reason(&self, words: &str) {
        self.until(words, |view| reason(view).contains(words)).await;
    }

    fn has_the_content(&self) -> bool {
        let data = self.data(1);
        data.len() == 8 * MIB
            && data[..content().len()] == content()[..]
            && data[content().len()..].iter().all(|byte| *byte == 0)
    }

    async fn until_no_leftovers(&self) {
        let deadline = Instant::now() + LONG;
        while !self.leftovers().is_empty() {
            assert!(Instant::now() < deadline, "{:?}", self.leftovers());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_zeros_is_read_and_what_is_known_comes_without_data() {
    let node = source().await;
    let all = read(&node, vec![volume(1)]).await.unwrap();
    let places: Vec<_> = all[1..].iter().map(|block| block.offset / MIB as u64).collect();
    assert_eq!((all[0].size_bytes, all[0].data.len()), (8 * MIB as u64, 0));
    assert_eq!(places, [0, 3, 4]);
    let mut whole = content();
    whole.resize(8 * MIB, 0);
    for block in &all[1..] {
        assert!(block.data == whole[block.offset as usize..][..MIB]);
        assert_eq!(block.digest, chunk_digest(&block.data)[..]);
    }
    // The second of these is another's, the third is right; and the rest of it is beyond the end.
    let digests = [&[0; 32][..], &[7; 32], &all[2].digest, &[9; 32 * 10]].concat();
    let again = read(&node, vec![volume(1), known(1, digests)]).await.unwrap();
    let data: Vec<_> = again[1..].iter().map(|block| block.data.len()).collect();
    assert_eq!(data, [MIB, 0, MIB]);
    assert_eq!(again[2].digest, all[2].digest);

    // A snapshot likewise, whatever becomes of its volume.
    let (of, part) = (uid(1).parse().unwrap(), uid(0x11).parse().unwrap());
    node.pool().create_snapshot(of, part).unwrap();
    node.pool().delete_volume(of).unwrap();
    let source = VolumeSource { volume_uid: uid(1), snapshot_uid: uid(0x11), pool: String::new() };
    let message = Some(read_volume_request::Message::Volume(source));
    let same = read(&node, vec![ReadVolumeRequest { message }]).await.unwrap();
    assert!(same == all);
}

/// A reader's patience ends where nothing comes: zeros that take long to read are told.
#[tokio::test(flavor = "multi_thread")]
async fn zeros_that_are_read_are_a_sign_of_life() {
    let node = source().await;
    let path = node.handle.activate("main", &uid(1)).unwrap();
    // Written, and not a hole.
    std::fs::write(path, vec![0; 8 * MIB]).unwrap();
    let opened = node.pool().open_volume(uid(1).parse().unwrap()).unwrap();
    let (answers, mut received) = tokio::sync::mpsc::channel(16);
    give_out(opened, Known::new(), answers, Duration::ZERO).await;
    let mut all = Vec::new();
    while let Some(answer) = received.recv().await {
        all.push(answer.unwrap());
    }
    assert_eq!(all.remove(0).size_bytes, 8 * MIB as u64);
    assert!(all.iter().all(|said| said.digest.is_empty() && said.data.is_empty()));
    let places: Vec<_> = all.iter().map(|said| said.offset / MIB as u64).collect();
    assert_eq!(places, [1, 2, 3, 4, 5, 6, 7, 8]);
}

/// Of an image likewise; who fetches it skips them.
#[tokio::test(flavor = "multi_thread")]
async fn an_images_zeros_are_a_sign_of_life() {
    let node = node().await;
    let digest = node.import_content().await;
    // Written, and not a hole.
    overwrite(node.dir.path(), &digest, MIB as u64, &vec![0; 2 * MIB]);
    let image = node.pool().open_image(digest.parse().unwrap()).unwrap();
    let all = std::sync::Mutex::new(Vec::new());
    images::give_out(&image, Duration::ZERO, |answer| {
        let said = answer.unwrap();
        all.lock().unwrap().push((said.offset / MIB as u64, said.data.len()));
        true
    });
    assert_eq!(*all.lock().unwrap(), [(0, 0), (0, MIB), (2, 0), (3, 0), (3, MIB), (4, 512)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_reads_are_refused() {
    let node = source().await;
    let with = |change: fn(&mut VolumeSource)| {
        let mut source = VolumeSource { volume_uid: uid(1), ..VolumeSource::default() };
        change(&mut source);
        vec![ReadVolumeRequest { message: Some(read_volume_request::Message::Volume(source)) }]
    };
    for (what, requests, code, words) in [
        ("nothing", vec![], Code::InvalidArgument, "volume"),
        ("known first", vec![known(0, vec![])], Code::InvalidArgument, "volume"),
        ("no uid", with(|source| source.volume_uid = "../x".into()), Code::InvalidArgument, "../x"),
        ("no such pool", with(|s| s.pool = "x".into()), Code::NotFound, "it has main"),
        ("no such volume", vec![volume(9)], Code::NotFound, "volume_uid: "),
        ("no such part", with(|s| s.snapshot_uid = uid(9)), Code::NotFound, "snapshot_uid: "),
        (
            "half a digest",
            vec![volume(1), known(0, vec![1; 31])],
            Code::InvalidArgument,
            "31 bytes",
        ),
        ("two volumes", vec![volume(1), volume(1)], Code::InvalidArgument, "known: "),
    ] {
        let status = read(&node, requests).await.unwrap_err();
        assert_eq!(status.code(), code, "{what}: {}", status.message());
        assert!(status.message().contains(words), "{what}: {}", status.message());
    }
    let vmm = lock(&node, 1).unwrap();
    let status = read(&node, vec![volume(1)]).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{}", status.message());
    drop(vmm);

    // So many at once, and no VMM meanwhile; one that goes makes room.
    let mut client = node.client().await;
    let mut readers = Vec::new();
    for _ in 0..4 {
        let (sender, receiver) = mpsc::channel(1);
        sender.send(volume(1)).await.unwrap();
        let answer = client.read_volume(ReceiverStream::new(receiver)).await.unwrap();
        readers.push((sender, answer.into_inner()));
    }
    let status = read(&node, vec![volume(1)]).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{}", status.message());
    assert!(lock(&node, 1).is_none());
    drop(readers);
    let deadline = Instant::now() + LONG;
    while let Err(status) = read(&node, vec![volume(1)]).await {
        assert!(Instant::now() < deadline, "{}", status.message());
    }
    while lock(&node, 1).is_none() {
        assert!(Instant::now() < deadline, "still locked");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_copied_when_nobody_has_it_open() {
    let (source, node) = (source().await, node().await);
    let vmm = lock(&source, 1).unwrap();
    node.want(vec![copied(source.address)], vec![]).await;
    node.until_reason("is in use").await;
    assert_eq!(node.pool().list().unwrap().volumes, []);
    drop(vmm);
    node.until_ready(1).await;
    assert!(node.has_the_content());
    node.until_no_leftovers().await;
    assert!(lock(&source, 1).is_some());
    // It stays what it is, though its source changes.
    std::fs::write(source.handle.activate("main", &uid(1)).unwrap(), vec![1; 8 * MIB]).unwrap();
    node.want(vec![WantedVolume { create: false, ..copied(source.address) }], vec![]).await;
    node.until_ready(1).await;
    assert!(node.has_the_content());
}

/// Passes on what both sides say; the first `cuts` connections for so many bytes of the server's
/// only: then they end, or stay as they are.
async fn wire(to: SocketAddr, cuts: usize, bytes: usize, hangs: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let count = AtomicUsize::new(0);
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let is_cut = count.fetch_add(1, Ordering::Relaxed) < cuts;
            let left = if is_cut { bytes } else { usize::MAX };
            tokio::spawn(async move {
                let server = TcpStream::connect(to).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let up = tokio::io::copy(&mut from_client, &mut to_server);
                let down = async {
                    let (mut left, mut piece) = (left, vec![0; 16 << 10]);
                    while left > 0 {
                        let count = from_server.read(&mut piece).await.unwrap_or(0).min(left);
                        if count == 0 || to_client.write_all(&piece[..count]).await.is_err() {
                            return;
                        }
                        left -= count;
                    }
                    if hangs {
                        std::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    _ = up => {}
                    () = down => {}
                }
            });
        }
    });
    address
}

/// Wherever the connection breaks: it is tried again, and what is half is never taken for whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_breaks_off_is_begun_again() {
    let source = source().await;
    for bytes in [1000, 100_000, 2 * MIB + 100, 3 * MIB + 100] {
        let node = node().await;
        let address = wire(source.address, 1, bytes, false).await;
        node.want(vec![copied(address)], vec![]).await;
        let tried = format!("tries again after: {address}: ");
        node.until_reason(&tried).await;
        assert_eq!(node.pool().list().unwrap().volumes, [], "after {bytes} bytes");
        node.until_ready(1).await;
        assert!(node.has_the_content(), "after {bytes} bytes");
        node.until_no_leftovers().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_nobody_wants_any_more_lets_its_source_go() {
    let (source, node) = (node().await, node().await);
    // More than waits in sockets.
    let large = |volume| WantedVolume { size_bytes: 64 * MIB as u64, ..volume };
    source.want(vec![large(blank(1))], vec![]).await;
    source.until_ready(1).await;
    std::fs::write(source.handle.activate("main", &uid(1)).unwrap(), vec![1; 64 * MIB]).unwrap();
    let address = wire(source.address, usize::MAX, 3 * MIB + MIB / 2, true).await;
    node.want(vec![large(copied(address))], vec![]).await;
    node.until_reason(&format!("copying from {address}, 3 %")).await;
    assert!(lock(&source, 1).is_none());
    node.want(vec![], vec![garbage(1)]).await;
    node.until("gone", |view| view.volumes.is_empty()).await;
    node.until_no_leftovers().await;
    let deadline = Instant::now() + LONG;
    while lock(&source, 1).is_none() {
        assert!(Instant::now() < deadline, "the source is still locked");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The agent dies in the middle: after its next start nothing is left of that, and the volume
/// comes all the same. So it does when the source's agent dies.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_goes_on_after_either_agents_death() {
    let (source, node) = (source().await, node().await);
    let address = wire(source.address, usize::MAX, 2 * MIB, true).await;
    node.want(vec![copied(address)], vec![]).await;
    node.until_reason("copying from ").await;
    let deadline = Instant::now() + LONG;
    while node.leftovers().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", node.handle.view());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // As a crash leaves it: nobody's any more.
    let half = node.dir.path().join("pool").join(&node.leftovers()[0]);
    std::fs::copy(&half, half.with_file_name(uuid::Uuid::new_v4().to_string())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::rename(node.dir.path().join("pool"), dir.path().join("pool")).unwrap();
    drop(node);

    let node = node_in(dir).await;
    node.until_no_leftovers().await;
    assert_eq!(node.pool().list().unwrap().volumes, []);
    let address = source.address;
    let pool = tempfile::tempdir().unwrap();
    std::fs::rename(source.dir.path().join("pool"), pool.path().join("pool")).unwrap();
    drop(source);
    node.want(vec![copied(address)], vec![]).await;
    node.until_reason(&format!("{address}: ")).await;
    let source = node_in(pool).await;
    node.want(vec![copied(source.address)], vec![]).await;
    node.until_ready(1).await;
    assert!(node.has_the_content());
}

/// A source that says what it is told to say.
#[derive(Debug)]
struct Scripted(Vec<Result<ReadSnapshotResponse, Status>>);

type Answers<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AgentService for Scripted {
    type AttachConsoleStream = Answers<drover_proto::v1::ConsoleOutput>;
    type ImportImageStream = Answers<ImportImageResponse>;
    type ReadImageStream = Answers<drover_proto::agent::v1::ReadImageResponse>;
    type ReadVolumeStream = Answers<ReadSnapshotResponse>;

    async fn read_volume(
        &self,
        _: Request<Streaming<ReadVolumeRequest>>,
    ) -> Result<Response<Self::ReadVolumeStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::iter(self.0.clone()))))
    }

    async fn attach_console(
        &self,
        _: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        Err(Status::unimplemented("not asked"))
    }

    async fn import_image(
        &self,
        _: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<Self::ImportImageStream>, Status> {
        Err(Status::unimplemented("not asked"))
    }

    async fn read_image(
        &self,
        _: Request<ReadImageRequest>,
    ) -> Result<Response<Self::ReadImageStream>, Status> {
        Err(Status::unimplemented("not asked"))
    }

    async fn call_guest(
        &self,
        _: Request<CallGuestRequest>,
    ) -> Result<Response<CallGuestResponse>, Status> {
        Err(Status::unimplemented("not asked"))
    }
}

async fn scripted(answers: Vec<Result<ReadSnapshotResponse, Status>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder()
        .add_service(AgentServiceServer::new(Scripted(answers)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(async { server.await.unwrap() });
    address
}

/// What another node sends is believed only block by block, and only to its end.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_errs_is_refused_and_nothing_is_left() {
    let size = |size_bytes| Ok(ReadSnapshotResponse { size_bytes, ..Default::default() });
    let first = || size(8 * MIB as u64);
    let good = |offset: usize| {
        let data = vec![5; MIB];
        let digest = chunk_digest(&data).to_vec().into();
        ReadSnapshotResponse { offset: offset as u64, digest, data: data.into(), size_bytes: 0 }
    };
    let mut flipped = good(MIB);
    flipped.digest = vec![1; 32].into();
    let mut empty = good(MIB);
    empty.data.clear();
    let undigested = ReadSnapshotResponse { digest: vec![].into(), ..good(MIB) };
    let zeros = |until: usize| {
        Ok(ReadSnapshotResponse { offset: until as u64, ..ReadSnapshotResponse::default() })
    };
    let busy = || Err(Status::resource_exhausted("others first"));
    for (what, answers, words) in [
        ("nothing", vec![], "sent nothing"),
        ("digest", vec![first(), Ok(good(0)), Ok(flipped)], "1048576: is not what its digest says"),
        ("no data", vec![first(), Ok(empty)], "has 0 bytes"),
        ("no digest", vec![first(), Ok(undigested)], "has no digest"),
        ("zeros behind it", vec![first(), zeros(8 * MIB + 1)], "has no digest"),
        ("between", vec![first(), Ok(good(512))], "512: is none of this disk's"),
        ("beyond", vec![first(), Ok(good(8 * MIB))], "is none of this disk's"),
        ("backwards", vec![first(), Ok(good(MIB)), Ok(good(0))], "content between 2097152"),
        ("too large", vec![size(1 << 60)], "bytes: 1152921504606846976"),
        ("an error", vec![first(), Ok(good(0)), Err(Status::internal("disk"))], "disk"),
        ("a full house", vec![first(), busy()], "others first"),
    ] {
        let node = node().await;
        node.want(vec![copied(scripted(answers).await)], vec![]).await;
        node.until_reason(words).await;
        node.until_no_leftovers().await;
        assert_eq!(node.pool().list().unwrap().volumes, [], "{what}");
    }
    // One that has more than was said is copied in whole; signs of life write nothing.
    let node = node().await;
    let (size, far) = (size(16 * MIB as u64), zeros(15 * MIB));
    let larger = vec![size, zeros(MIB), far, Ok(good(15 * MIB)), zeros(16 * MIB)];
    node.want(vec![copied(scripted(larger).await)], vec![]).await;
    node.until_ready(1).await;
    assert!(node.data(1)[15 * MIB..] == vec![5; MIB]);
}
