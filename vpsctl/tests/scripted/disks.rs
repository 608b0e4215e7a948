//! The member's side of snapshots, and a node behind it that really keeps the blocks: what is read
//! of a snapshot, imported and put in place of a disk is content, not a script.

use std::collections::BTreeMap;

use drover_proto::v1::{
    read_snapshot_request::Message, snapshot_service_server::SnapshotService, *,
};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    common::WAIT_MAX,
    member::{Answer, Flow, Scripted},
};

pub(crate) const BLOCK: usize = 1 << 20;

/// What the node holds, and how reading it goes wrong.
#[derive(Clone, Default)]
pub(crate) struct Content {
    /// The disks of domains/web1, in their order.
    pub(crate) disks: Vec<Vec<u8>>,
    pub(crate) snapshots: BTreeMap<String, Vec<Vec<u8>>>,
    pub(crate) images: BTreeMap<String, Vec<u8>>,
    /// By the request's id.
    pub(crate) imported: BTreeMap<String, Image>,
    /// Of blocks that were sent with their data.
    pub(crate) sent_bytes: usize,
    /// The next stream breaks when so many blocks have been sent.
    pub(crate) break_after: Option<usize>,
    /// The next stream stops there until it is told to go on.
    pub(crate) pause_after: Option<usize>,
    /// The first block of the next stream is not what its digest says.
    pub(crate) lies: bool,
    /// Refusals of the next streams: others come first.
    pub(crate) crowded: u32,
    /// Refusals of the next deletions of a snapshot.
    pub(crate) busy: u32,
}

pub(crate) fn sha256(data: &[u8]) -> [u8; 32] {
    Sha256::digest(data).into()
}

/// As `storage` makes it.
pub(crate) fn image_digest(content: &[u8]) -> String {
    let hex = |data: &[u8]| sha256(data).iter().map(|b| format!("{b:02x}")).collect::<String>();
    let lines: String = content.chunks(BLOCK).map(|chunk| hex(chunk) + "\n").collect();
    hex(format!("drover-image-1 {}\n{lines}", content.len()).as_bytes())
}

impl Content {
    fn snapshot(&self, name: &str) -> Option<Snapshot> {
        let contents = self.snapshots.get(name)?;
        let disk = |(place, content): (usize, &Vec<u8>)| SnapshotDisk {
            volume: format!("volumes/web1-{place}"),
            pool: "ssd".to_owned(),
            size_bytes: content.len() as u64,
            allocated_bytes: content.len() as u64 / 2,
        };
        let mut snapshot = Snapshot {
            name: name.to_owned(),
            domain: "domains/web1".to_owned(),
            node: "nodes/host1".to_owned(),
            quiesced: true,
            disks: contents.iter().enumerate().map(disk).collect(),
            create_time: Some(std::time::SystemTime::now().into()),
            ..Snapshot::default()
        };
        snapshot.set_state(SnapshotState::Ready);
        Some(snapshot)
    }
}

fn missing(name: &str) -> Status {
    Status::not_found(format!("there is no {name}"))
}

impl Scripted {
    /// Sends the blocks that are not zeros; those that are known without data.
    async fn send_blocks(
        self,
        content: Vec<u8>,
        known: BTreeMap<u64, [u8; 32]>,
        answers: mpsc::Sender<Result<ReadSnapshotResponse, Status>>,
    ) {
        let (break_after, pause_after, mut lies) = {
            let mut node = self.node.lock().unwrap();
            (node.break_after.take(), node.pause_after.take(), std::mem::take(&mut node.lies))
        };
        let size_bytes = content.len() as u64;
        let _ = answers.send(Ok(ReadSnapshotResponse { size_bytes, ..Default::default() })).await;
        let blocks = content.chunks(BLOCK).enumerate();
        let blocks = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        for (count, (index, block)) in blocks.enumerate() {
            if break_after == Some(count) {
                let _ = answers.send(Err(Status::unavailable("the leader is gone"))).await;
                return;
            }
            if pause_after == Some(count) {
                let _ = self.paused.try_send(());
                let _ = tokio::time::timeout(WAIT_MAX, self.go_on.notified()).await;
            }
            // As a node that has read zeros for long.
            let offset = (index * BLOCK) as u64;
            let zeros = ReadSnapshotResponse { offset, ..Default::default() };
            if answers.send(Ok(zeros)).await.is_err() {
                return;
            }
            let mut whole = block.to_vec();
            whole.resize(BLOCK, 0);
            let mut digest = sha256(&whole);
            if std::mem::take(&mut lies) {
                digest[0] ^= 1;
            }
            let is_known = known.get(&(index as u64)) == Some(&digest);
            let data = if is_known { Vec::new() } else { block.to_vec() };
            self.node.lock().unwrap().sent_bytes += data.len();
            let answer = ReadSnapshotResponse {
                size_bytes: 0,
                offset: (index * BLOCK) as u64,
                digest: digest.to_vec().into(),
                data: data.into(),
            };
            if answers.send(Ok(answer)).await.is_err() {
                return;
            }
        }
    }
}

#[tonic::async_trait]
impl SnapshotService for Scripted {
    type ReadSnapshotStream = Flow<ReadSnapshotResponse>;

    async fn create_snapshot(&self, request: Request<CreateSnapshotRequest>) -> Answer<Operation> {
        let request = request.into_inner();
        self.did(format!("snapshot {} as {}", request.domain, request.name));
        let mut node = self.node.lock().unwrap();
        let contents = node.disks.clone();
        node.snapshots.insert(request.name, contents);
        self.accepted()
    }
    async fn get_snapshot(&self, request: Request<GetSnapshotRequest>) -> Answer<Snapshot> {
        let name = &request.get_ref().name;
        let snapshot = self.node.lock().unwrap().snapshot(name);
        snapshot.map(Response::new).ok_or_else(|| missing(name))
    }
    async fn list_snapshots(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Answer<ListSnapshotsResponse> {
        self.did(format!("list snapshots of \"{}\"", request.get_ref().domain));
        let node = self.node.lock().unwrap();
        let snapshots = node.snapshots.keys().filter_map(|name| node.snapshot(name)).collect();
        Ok(Response::new(ListSnapshotsResponse { snapshots, ..Default::default() }))
    }
    async fn restore_snapshot(
        &self,
        request: Request<RestoreSnapshotRequest>,
    ) -> Answer<Operation> {
        let name = request.into_inner().name;
        self.did(format!("restore {name}"));
        let mut node = self.node.lock().unwrap();
        node.disks = node.snapshots.get(&name).cloned().ok_or_else(|| missing(&name))?;
        self.accepted()
    }
    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Answer<DeleteSnapshotResponse> {
        let name = request.into_inner().name;
        let mut node = self.node.lock().unwrap();
        if node.busy > 0 {
            node.busy -= 1;
            return Err(Status::failed_precondition(format!("{name} is being taken")));
        }
        self.did(format!("delete {name}"));
        node.snapshots.remove(&name).ok_or_else(|| missing(&name))?;
        Ok(Response::new(DeleteSnapshotResponse {}))
    }
    async fn read_snapshot(
        &self,
        request: Request<Streaming<ReadSnapshotRequest>>,
    ) -> Answer<Flow<ReadSnapshotResponse>> {
        let mut input = request.into_inner();
        let Some(ReadSnapshotRequest { message: Some(Message::Spec(spec)) }) =
            input.message().await?
        else {
            return Err(Status::invalid_argument("the first message has no spec"));
        };
        {
            let mut node = self.node.lock().unwrap();
            if node.crowded > 0 {
                node.crowded -= 1;
                return Err(Status::resource_exhausted("nodes/host1 gives 4 volumes out already"));
            }
        }
        let mut known = BTreeMap::new();
        while let Some(ReadSnapshotRequest { message: Some(Message::Known(part)) }) =
            input.message().await?
        {
            assert!(part.digests.len() % 32 == 0 && part.digests.len() <= 32 * 32_768);
            for (index, digest) in part.digests.chunks(32).enumerate() {
                known.insert(part.first_block + index as u64, digest.try_into().unwrap());
            }
        }
        let contents = self.node.lock().unwrap().snapshots.get(&spec.name).cloned();
        let contents = contents.ok_or_else(|| missing(&spec.name))?;
        let content = contents.get(spec.disk as usize).cloned();
        let content = content.ok_or_else(|| Status::invalid_argument("spec.disk: too large"))?;
        if known.keys().any(|index| *index >= content.len().div_ceil(BLOCK) as u64) {
            return Err(Status::invalid_argument("known.first_block: behind the last block"));
        }
        // One message at a time: what was not taken was not sent.
        let (sender, answers) = mpsc::channel(1);
        tokio::spawn(self.clone().send_blocks(content, known, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}
