//! The storage task against real pools of files, and images and volumes that travel between two
//! agents' services on loopback.

mod snapshots;
mod travel;

use super::*;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use drover_proto::agent::v1::agent_service_client::AgentServiceClient;
use drover_proto::agent::v1::{Garbage, ReadImageRequest, WantedVolume};
use drover_proto::v1::{
    ImageFormat, ImportImageRequest, ImportImageResponse, ImportImageSpec, PoolState,
    import_image_request,
};
use drover_storage::pool::{PoolUsage, VolumeId};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Channel, Server};
use tonic::{Code, Status};

use crate::console::Console;
use crate::domain::quiesce::Quiescer;
use crate::records::Places;
use crate::service::Service;

const LONG: Duration = Duration::from_secs(30);
const MIB: usize = 1 << 20;

fn uid(n: u8) -> String {
    format!("4d8e0f0e-6c6f-4d3b-8f1e-0000000000{n:02x}")
}

/// Two chunks of data with a hole of two between them, and a short end.
fn content() -> Vec<u8> {
    let mut content = vec![0; 4 * MIB + 512];
    for (at, byte) in content[..MIB].iter_mut().enumerate() {
        *byte = (at % 251) as u8;
    }
    content[3 * MIB + 5] = 9;
    content[4 * MIB] = 7;
    content
}

/// A node with one pool, `main`, and its AgentService.
struct Node {
    dir: tempfile::TempDir,
    handle: StorageHandle,
    address: SocketAddr,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Node {
    /// As by SIGKILL: nothing is told to end.
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

fn places(dir: &tempfile::TempDir) -> Places {
    Places { state: dir.path().join("state"), run: dir.path().join("run") }
}

async fn node() -> Node {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("pool")).unwrap();
    node_in(dir).await
}

async fn node_in(dir: tempfile::TempDir) -> Node {
    let flag = format!("main=dir:{}", dir.path().join("pool").display()).parse().unwrap();
    let places = places(&dir);
    let quiescer = Quiescer::new(places.clone());
    let started = start(&[flag], "a", &places.state, quiescer, watch::Sender::new(0)).await;
    let (handle, task) = started.unwrap();
    let spool = places.state.clone();
    std::fs::create_dir_all(&spool).unwrap();
    let service = Service {
        console: Console::new(places.clone(), "host1".into()),
        guests: crate::domain::guest::Guests::new(places, "host1".into()),
        images: Images::new(handle.clone(), "host1".into(), spool),
        volumes: Volumes::new(handle.clone(), "host1".into()),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder()
        .add_service(service.server())
        .serve_with_incoming(TcpListenerStream::new(listener));
    let server = tokio::spawn(async { server.await.unwrap() });
    Node { dir, handle, address, tasks: vec![task, server] }
}

impl Node {
    async fn want(&self, volumes: Vec<WantedVolume>, garbage: Vec<Garbage>) {
        let wanted = WantedStorage { volumes, garbage, ..WantedStorage::default() };
        self.handle.desire(wanted).await.unwrap();
    }

    /// Waits for a view that fits; panics with the last one otherwise.
    async fn until(&self, what: &str, fits: impl Fn(&View) -> bool) -> Arc<View> {
        let mut handle = self.handle.clone();
        let deadline = Instant::now() + LONG;
        loop {
            let view = handle.view.borrow_and_update().clone();
            if fits(&view) {
                return view;
            }
            if timeout_at(deadline, handle.changed()).await.is_err() {
                panic!("{what}: {view:#?}");
            }
        }
    }

    async fn until_ready(&self, n: u8) {
        let is = |view: &View| {
            view.volumes.iter().any(|v| v.uid == uid(n) && v.state() == VolumeState::Ready)
        };
        self.until("READY", is).await;
    }

    fn pool(&self) -> &Arc<dyn Pool> {
        self.handle.pools[0].pool().unwrap()
    }

    fn data(&self, n: u8) -> Vec<u8> {
        std::fs::read(self.handle.activate("main", &uid(n)).unwrap()).unwrap()
    }

    /// What is in the pool that is not whole.
    fn leftovers(&self) -> Vec<String> {
        self.pool().list().unwrap().leftovers
    }

    async fn client(&self) -> AgentServiceClient<Channel> {
        AgentServiceClient::connect(format!("http://{}", self.address)).await.unwrap()
    }

    async fn import(
        &self,
        requests: Vec<ImportImageRequest>,
    ) -> Result<ImportImageResponse, Status> {
        let mut client = self.client().await;
        let mut answers = client.import_image(tokio_stream::iter(requests)).await?.into_inner();
        let mut last = Err(Status::internal("no answer"));
        while let Some(answer) = answers.message().await? {
            last = Ok(answer);
        }
        last
    }

    async fn import_content(&self) -> String {
        let answer = self.import(requests(raw_spec(), &content())).await.unwrap();
        answer.image.unwrap().digest
    }
}

fn blank(n: u8) -> WantedVolume {
    WantedVolume {
        uid: uid(n),
        pool: "main".into(),
        size_bytes: 8 * MIB as u64,
        create: true,
        ..WantedVolume::default()
    }
}

fn of_image(n: u8, digest: &str, sources: &[&Node]) -> WantedVolume {
    WantedVolume {
        image_digest: digest.into(),
        image_size_bytes: content().len() as u64,
        image_sources: sources.iter().map(|node| node.address.to_string()).collect(),
        ..blank(n)
    }
}

fn garbage(n: u8) -> Garbage {
    Garbage { pool: "main".into(), volume_uid: uid(n), ..Garbage::default() }
}

fn raw_spec() -> ImportImageSpec {
    ImportImageSpec {
        format: ImageFormat::Raw.into(),
        file_bytes: content().len() as u64,
        ..ImportImageSpec::default()
    }
}

fn data(bytes: &[u8]) -> ImportImageRequest {
    let data = import_image_request::Message::Data(bytes.to_vec().into());
    ImportImageRequest { message: Some(data) }
}

fn requests(spec: ImportImageSpec, content: &[u8]) -> Vec<ImportImageRequest> {
    let spec = import_image_request::Message::Spec(spec);
    let first = ImportImageRequest { message: Some(spec) };
    std::iter::once(first).chain(content.chunks(700_000).map(data)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_come_and_go_as_they_are_wanted() {
    let node = node().await;
    // Nothing is wanted yet: what is there stays.
    let stranger: VolumeId = uid(7).parse().unwrap();
    node.pool().create_volume(stranger, MIB as u64).unwrap();

    node.want(vec![blank(1), blank(2)], vec![]).await;
    let disk = |n: u8| Disk {
        volume: uid(n),
        pool: "main".into(),
        read_only: false,
        serial: String::new(),
        slot: None,
        limits: Default::default(),
    };
    node.until_ready(1).await;
    node.until_ready(2).await;
    assert_eq!(node.handle.clone().disks(&[disk(1), disk(2)]), Disks::Ready);
    assert_eq!(node.data(1), vec![0; 8 * MIB]);

    // One of them is lost: that is seen, and no blank one takes its place.
    std::fs::write(node.handle.activate("main", &uid(1)).unwrap(), vec![1; 8 * MIB]).unwrap();
    node.pool().delete_volume(uid(2).parse().unwrap()).unwrap();
    let kept = |n| WantedVolume { create: false, ..blank(n) };
    node.want(vec![kept(1), kept(2)], vec![]).await;
    let failed =
        |view: &View| view.volumes.iter().any(|v| v.state_reason == "its data is not there");
    node.until("a lost volume", failed).await;
    let disks = node.handle.clone().disks(&[disk(1), disk(2)]);
    assert_eq!(disks, Disks::Failed("disk 2: its data is not there".into()));

    // One that is open stays until it is not; the one that nobody named stays for ever.
    let open = std::fs::File::options()
        .write(true)
        .open(node.handle.activate("main", &uid(1)).unwrap())
        .unwrap();
    rustix::fs::flock(&open, rustix::fs::FlockOperation::LockExclusive).unwrap();
    node.want(vec![], vec![garbage(1)]).await;
    let refused = |view: &View| {
        let volume = view.volumes.iter().find(|v| v.uid == uid(1));
        volume.is_some_and(|v| v.state_reason.contains("is in use"))
    };
    node.until("a refusal", refused).await;
    drop(open);
    let gone = |view: &View| view.volumes.iter().all(|v| v.uid != uid(1));
    let view = node.until("its end", gone).await;
    assert!(view.volumes.iter().any(|v| v.uid == uid(7)));
    assert_eq!(node.pool().list().unwrap().volumes.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_fetched_once_for_all_that_wait() {
    let (source, node) = (node().await, node().await);
    let digest = source.import_content().await;
    let stray = "127.0.0.1:1".to_owned();
    let mut first = of_image(1, &digest, &[]);
    first.image_sources = vec![stray];
    // A source that is not there, then one that is.
    node.want(vec![first.clone()], vec![]).await;
    let tried = |view: &View| {
        view.volumes.iter().any(|v| v.state_reason.contains("127.0.0.1:1: cannot be reached"))
    };
    node.until("a reason", tried).await;
    let wanted = vec![first, of_image(2, &digest, &[&source]), of_image(3, &digest, &[&source])];
    node.want(wanted, vec![]).await;
    for n in 1..=3 {
        node.until_ready(n).await;
        let data = node.data(n);
        assert!(data[..content().len()] == content()[..], "volume {n}");
        assert!(data[content().len()..].iter().all(|byte| *byte == 0) && data.len() == 8 * MIB);
    }
    let view = node.handle.view();
    assert_eq!((view.images.len(), view.images[0].digest.as_str()), (1, digest.as_str()));
    assert_eq!(node.leftovers(), [""; 0]);

    // Volumes do not need it any more.
    let image = Garbage { pool: "main".into(), image_digest: digest, ..Garbage::default() };
    node.want(vec![], vec![image]).await;
    node.until("no image", |view| view.images.is_empty()).await;
    assert!(node.data(1)[..content().len()] == content()[..]);
}

/// What another node sends is believed only when it is the image that was asked for.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_another_content_is_refused() {
    let (source, node) = (node().await, node().await);
    let digest = source.import_content().await;
    let path = source.dir.path().join("pool");
    damage(&path, &digest);
    node.want(vec![of_image(1, &digest, &[&source])], vec![]).await;
    let refused =
        |view: &View| view.volumes.iter().any(|v| v.state_reason.contains("image: expected"));
    node.until("a refusal", refused).await;
    let there = node.pool().list().unwrap();
    assert_eq!((there.images.len(), there.volumes.len(), there.leftovers.len()), (0, 0, 0));
}

/// Changes one byte of an image's file.
fn damage(pool: &Path, digest: &str) {
    overwrite(pool, digest, 77, b"x");
}

fn overwrite(pool: &Path, digest: &str, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let mut folders = vec![pool.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().contains(digest) {
                use std::os::unix::fs::PermissionsExt;
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
                let file = std::fs::File::options().write(true).open(path).unwrap();
                file.write_all_at(bytes, at).unwrap();
                return;
            }
        }
    }
    panic!("no file of image {digest}");
}

/// The agent dies in the middle of a fetch: after its next start nothing is left of that, and
/// the volume is made all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_on_after_the_agents_death() {
    let (source, node) = (node().await, node().await);
    let digest = source.import_content().await;
    // As a crash leaves it: begun, not published, and nobody's any more.
    let draft = node.pool().draft_image(MIB as u64).unwrap();
    let path = draft.path().to_owned();
    let copy = path.with_extension("copy");
    std::fs::copy(&path, &copy).unwrap();
    drop(draft);
    std::fs::rename(copy, path).unwrap();
    assert_eq!(node.leftovers().len(), 1);
    let dir = tempfile::tempdir().unwrap();
    std::fs::rename(node.dir.path().join("pool"), dir.path().join("pool")).unwrap();
    drop(node);

    let node = node_in(dir).await;
    assert_eq!(node.leftovers().len(), 0);
    assert_eq!(node.handle.view().pools[0].state(), PoolState::Ready);
    node.want(vec![of_image(1, &digest, &[&source])], vec![]).await;
    node.until_ready(1).await;
    assert!(node.data(1)[..content().len()] == content()[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_gone_is_failed_and_its_volumes_are_told() {
    let node = node().await;
    node.want(vec![blank(1)], vec![]).await;
    node.until_ready(1).await;
    std::fs::rename(node.dir.path().join("pool"), node.dir.path().join("away")).unwrap();
    let failed = |view: &View| {
        view.pools[0].state() == PoolState::Failed
            && view.volumes.iter().any(|v| v.state() == VolumeState::Failed)
    };
    let view = node.until("FAILED", failed).await;
    assert!(!view.pools[0].state_reason.is_empty());
    std::fs::rename(node.dir.path().join("away"), node.dir.path().join("pool")).unwrap();
    node.until_ready(1).await;
}

/// It keeps nobody from starting, is told, and is there as soon as it can be opened.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_cannot_be_opened_is_failed_and_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let node = node_in(dir).await;
    let view = node.handle.view();
    let path = node.dir.path().join("pool");
    let reason = view.pools[0].state_reason.clone();
    assert_eq!(view.pools[0].state(), PoolState::Failed);
    assert!(reason.contains(path.to_str().unwrap()) && reason.contains("existing"), "{reason}");
    node.want(vec![blank(1)], vec![garbage(2)]).await;
    let failed = |view: &View| {
        let failed = view.volumes.iter().filter(|v| v.state() == VolumeState::Failed);
        failed.count() == 2
    };
    node.until("what nobody can know", failed).await;
    let import = node.import(requests(raw_spec(), &content())).await.unwrap_err();
    assert!(import.message().contains("is not open yet"), "{}", import.message());
    std::fs::create_dir(path).unwrap();
    node.until_ready(1).await;
    assert_eq!(node.handle.view().pools[0].state(), PoolState::Ready);
    node.import_content().await;
}

/// A pool past its threshold takes nothing new, and says so before a guest sees an error.
#[test]
fn a_pool_that_fills_is_told() {
    let state = |used_bytes, fault: Option<&str>| {
        let fault = fault.map(str::to_owned);
        let usage = PoolUsage { bytes: 1000, used_bytes, metadata_fraction: Some(0.1), fault };
        let refused = import::check_room("main", &usage, 100).is_err();
        let (state, reason) = task::state_of(Some(&usage), None);
        (state, reason, refused)
    };
    assert_eq!(state(500, None), (PoolState::Ready, String::new(), false));
    assert!(state(701, None).2, "an image must fit below the threshold");
    for used in [800, 990] {
        let (state, reason, refused) = state(used, None);
        assert!(state == PoolState::Filling && refused && reason.contains("% of 1000 bytes"));
    }
    let (state, reason, refused) = state(10, Some("out_of_data"));
    assert!(state == PoolState::Failed && refused && reason.contains("out_of_data"), "{reason}");
    let (state, reason) = task::state_of(None, Some("gone".into()));
    assert_eq!((state, reason.as_str()), (PoolState::Failed, "gone"));
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_that_contradict_each_other_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let flag = |text: String| text.parse::<PoolFlag>().unwrap();
    let here = || flag(format!("main=dir:{}", dir.path().display()));
    let quiescer = Quiescer::new(places(&dir));
    let error = |flags: Vec<PoolFlag>| {
        let quiescer = quiescer.clone();
        async move {
            let none = std::path::Path::new("/nonexistent");
            let started = start(&flags, "a", none, quiescer, watch::Sender::new(0)).await;
            started.map(|_| ()).unwrap_err().to_string()
        }
    };
    let twice = error(vec![here(), here()]).await;
    assert!(twice.contains("main: is given twice"), "{twice}");
    let other = flag(format!("b=dir:{}", dir.path().display()));
    let same = error(vec![here(), other]).await;
    assert!(same.contains("a pool has one id"), "{same}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_ends_with_an_image_that_can_be_read() {
    let node = node().await;
    let digest = node.import_content().await;
    node.until("the image", |view| view.images.iter().any(|i| i.digest == digest)).await;
    // Of unknown length it takes the other way, and is the same.
    let unknown = ImportImageSpec { file_bytes: 0, ..raw_spec() };
    let answer = node.import(requests(unknown, &content())).await.unwrap();
    assert_eq!(answer.bytes_done, content().len() as u64);
    let image = answer.image.unwrap();
    assert_eq!((image.digest.as_str(), image.size_bytes), (&*digest, content().len() as u64));

    let request = ReadImageRequest { digest: digest.clone() };
    let mut stream = node.client().await.read_image(request).await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.size_bytes, content().len() as u64);
    let mut read = vec![0; first.size_bytes as usize];
    let mut sent = 0;
    while let Some(piece) = stream.message().await.unwrap() {
        assert!(piece.data.len() <= MIB);
        sent += piece.data.len();
        read[piece.offset as usize..][..piece.data.len()].copy_from_slice(&piece.data);
    }
    assert!(read == content());
    assert!(sent <= 2 * MIB + 512, "holes are not sent: {sent}");
    let other = ReadImageRequest { digest: "ab".repeat(32) };
    let missing = node.client().await.read_image(other).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
}

/// Whatever is wrong with an import: one clear error, and nothing is left.
#[tokio::test(flavor = "multi_thread")]
async fn bad_imports_leave_nothing() {
    let node = node().await;
    let right = content();
    let with = |change: fn(&mut ImportImageSpec)| {
        let mut spec = raw_spec();
        change(&mut spec);
        requests(spec, &right)
    };
    let short = requests(raw_spec(), &right[..MIB]);
    let long = requests(raw_spec(), &[right.as_slice(), &[0; 512]].concat());
    for (what, sent, code, words) in [
        ("no spec", vec![data(&right[..MIB])], Code::InvalidArgument, "spec"),
        ("no format", with(|spec| spec.format = 0), Code::InvalidArgument, "format"),
        ("not qcow2", with(|spec| spec.format = 2), Code::InvalidArgument, "magic"),
        ("no pool", with(|spec| spec.pool = "x".into()), Code::FailedPrecondition, "it has main"),
        ("no digest", with(|spec| spec.sha256 = "12".into()), Code::InvalidArgument, "sha256"),
        (
            "another digest",
            with(|spec| spec.sha256 = "ab".repeat(32)),
            Code::InvalidArgument,
            "sha256: expected abab",
        ),
        (
            "another digest, unknown length",
            with(|spec| (spec.sha256, spec.file_bytes) = ("ab".repeat(32), 0)),
            Code::InvalidArgument,
            "sha256: expected abab",
        ),
        ("too short", short, Code::InvalidArgument, "ends early"),
        ("too long", long, Code::InvalidArgument, "announced length"),
        ("too large", with(|spec| spec.file_bytes = 1 << 60), Code::ResourceExhausted, "no room"),
        (
            "a file by URL",
            with(|spec| spec.url = "file:///etc/shadow".into()),
            Code::FailedPrecondition,
            "http://… or https://…",
        ),
    ] {
        let status = node.import(sent).await.unwrap_err();
        assert_eq!(status.code(), code, "{what}: {}", status.message());
        assert!(status.message().contains(words), "{what}: {}", status.message());
        nothing_is_left(&node, what).await;
    }
}

async fn nothing_is_left(node: &Node, what: &str) {
    let deadline = Instant::now() + LONG;
    loop {
        let there = node.pool().list().unwrap();
        let spool = std::fs::read_dir(node.dir.path().join("state")).unwrap().count();
        if there.images.is_empty() && there.leftovers.is_empty() && spool == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {there:?}, {spool} files wait");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The caller goes away in the middle, on either way into the pool.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_breaks_off_leaves_nothing() {
    let node = node().await;
    for file_bytes in [content().len() as u64, 0] {
        let mut client = node.client().await;
        let (sender, receiver) = mpsc::channel(8);
        let spec = ImportImageSpec { file_bytes, ..raw_spec() };
        for request in requests(spec, &content()[..2 * MIB]) {
            sender.send(request).await.unwrap();
        }
        let stream = ReceiverStream::new(receiver);
        let mut answers = client.import_image(stream).await.unwrap().into_inner();
        // It is on its way when it says how much has come.
        loop {
            let answer = answers.message().await.unwrap().unwrap();
            if answer.bytes_done > 0 {
                break;
            }
        }
        drop((answers, sender, client));
        nothing_is_left(&node, "broken off").await;
    }
    // And there is room for the next ones.
    node.import_content().await;
}

/// A web server that says `head` and sends `body`, once for each of these.
async fn web(answers: Vec<(String, Vec<u8>)>) -> SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for (head, body) in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            let head = head.replace("ADDRESS", &address.to_string());
            stream.write_all(head.as_bytes()).await.unwrap();
            // A client that has had enough hangs up.
            let _ = stream.write_all(&body).await;
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_comes_by_url() {
    let node = node().await;
    let length = content().len();
    let ok = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
    let elsewhere = "HTTP/1.1 302 Found\r\nLocation: http://ADDRESS/disk\r\n\r\n".to_owned();
    let by_url = |address: SocketAddr| {
        let url = format!("http://{address}/");
        requests(ImportImageSpec { url, file_bytes: 0, ..raw_spec() }, &[])
    };

    let half = web(vec![(ok.clone(), content()[..MIB].to_vec())]).await;
    let status = node.import(by_url(half)).await.unwrap_err();
    assert!(status.message().contains("broke off"), "{}", status.message());
    let missing = web(vec![("HTTP/1.1 404 Not Found\r\n\r\n".into(), vec![])]).await;
    let status = node.import(by_url(missing)).await.unwrap_err();
    assert!(status.message().contains("404"), "{}", status.message());
    let circle = web(vec![(elsewhere.clone(), vec![]); 9]).await;
    let status = node.import(by_url(circle)).await.unwrap_err();
    assert!(status.message().contains("redirects"), "{}", status.message());
    nothing_is_left(&node, "by URL").await;

    let right = web(vec![(elsewhere, vec![]), (ok, content())]).await;
    let image = node.import(by_url(right)).await.unwrap().image.unwrap();
    assert_eq!(image.digest, node.import_content().await);
}
