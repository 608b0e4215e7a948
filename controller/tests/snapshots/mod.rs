//! Snapshots and volumes as callers meet them: through a real controller, with an agent that has
//! whatever it shall have, and in it one block.

use drover_proto::agent::v1::{ReadVolumeRequest, read_volume_request};
use drover_proto::v1::read_snapshot_request::Message;
use drover_proto::v1::snapshot_service_client::SnapshotServiceClient;
use drover_proto::v1::volume_service_client::VolumeServiceClient;
use drover_proto::v1::{
    AttachVolumeRequest, CreateSnapshotRequest, CreateVolumeRequest, DeleteSnapshotRequest,
    DeleteVolumeRequest, DetachVolumeRequest, Disk, GetSnapshotRequest, GetVolumeRequest,
    KnownBlocks, ListSnapshotsRequest, OperationState, ReadSnapshotRequest, ReadSnapshotResponse,
    ReadSnapshotSpec, RestoreSnapshotRequest, SnapshotState, StopDomainRequest, Volume,
    VolumeState,
};
use futures::stream::{self, StreamExt};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use crate::images::{World, world};
use crate::service::{create, within};

const MIB: u64 = 1 << 20;
/// Of the only block that is not zeros.
const DIGEST: [u8; 32] = [7; 32];

/// What the agent answers: a disk of 2 MiB, zeros first, then one block, whose data it leaves out
/// when the caller knows it. It must be asked for a part of a snapshot.
pub(crate) async fn blocks(
    mut input: Streaming<ReadVolumeRequest>,
) -> Result<Vec<ReadSnapshotResponse>, Status> {
    let mut known = false;
    while let Some(message) = input.message().await? {
        match message.message {
            Some(read_volume_request::Message::Volume(volume))
                if volume.pool != "ssd" || volume.snapshot_uid.is_empty() =>
            {
                return Err(Status::invalid_argument(format!("{volume:?}")));
            }
            Some(read_volume_request::Message::Known(blocks)) => {
                known |= blocks.first_block == 1 && blocks.digests == DIGEST.as_slice();
            }
            _ => {}
        }
    }
    let size = ReadSnapshotResponse { size_bytes: 2 * MIB, ..ReadSnapshotResponse::default() };
    let data = if known { Vec::new() } else { vec![1; 1 << 20] };
    let block = ReadSnapshotResponse {
        offset: MIB,
        digest: DIGEST.to_vec().into(),
        data: data.into(),
        ..ReadSnapshotResponse::default()
    };
    let zeros = ReadSnapshotResponse { offset: MIB, ..ReadSnapshotResponse::default() };
    Ok(vec![size, zeros, block])
}

fn snapshots(world: &World) -> SnapshotServiceClient<Channel> {
    SnapshotServiceClient::new(world.controllers.client(1).channel())
}

fn volumes(world: &World) -> VolumeServiceClient<Channel> {
    VolumeServiceClient::new(world.controllers.client(1).channel())
}

/// A domain `vm` with a disk of 2 MiB that is stopped.
async fn stopped() -> World {
    let world = world().await;
    let client = world.controllers.client(1);
    let mut request = create("vm", "a");
    let spec = request.domain.as_mut().unwrap().spec.as_mut().unwrap();
    spec.disks = vec![Disk { size_bytes: 2 * MIB, ..Disk::default() }];
    let made = client.domains().create_domain(request).await.unwrap().into_inner();
    assert_eq!(client.wait(&made.name).await.state(), OperationState::Succeeded);
    let stop = StopDomainRequest { name: "domains/vm".into(), force: true, ..Default::default() };
    let stop = client.domains().stop_domain(stop).await.unwrap().into_inner();
    assert_eq!(client.wait(&stop.name).await.state(), OperationState::Succeeded);
    world
}

async fn take(world: &World) {
    let request = CreateSnapshotRequest {
        name: "snapshots/one".into(),
        domain: "domains/vm".into(),
        request_id: "11111111-2222-4333-8444-555555555555".into(),
    };
    let first = snapshots(world).create_snapshot(request.clone()).await.unwrap().into_inner();
    let again = snapshots(world).create_snapshot(request).await.unwrap().into_inner();
    assert_eq!(first.name, again.name, "a request id is answered once");
    let done = world.controllers.client(1).wait(&first.name).await;
    assert_eq!(done.state(), OperationState::Succeeded, "{done:?}");
}

fn spec(name: &str, disk: u32) -> ReadSnapshotRequest {
    let spec = ReadSnapshotSpec { name: name.into(), disk };
    ReadSnapshotRequest { message: Some(Message::Spec(spec)) }
}

fn known(first_block: u64, digests: &[u8]) -> ReadSnapshotRequest {
    let known = KnownBlocks { first_block, digests: digests.to_vec().into() };
    ReadSnapshotRequest { message: Some(Message::Known(known)) }
}

/// Everything that comes, or the error in its place.
async fn read(
    world: &World,
    messages: Vec<ReadSnapshotRequest>,
) -> Result<Vec<ReadSnapshotResponse>, Status> {
    let blocks = snapshots(world).read_snapshot(stream::iter(messages)).await?.into_inner();
    within("the blocks", blocks.collect::<Vec<_>>()).await.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_taken_read_put_back_and_deleted() {
    let world = stopped().await;
    take(&world).await;
    let mut client = snapshots(&world);
    let name = "snapshots/one".to_owned();
    let get = GetSnapshotRequest { name: name.clone() };
    let held = client.get_snapshot(get.clone()).await.unwrap().into_inner();
    assert_eq!((held.state(), held.quiesced), (SnapshotState::Ready, true));
    assert_eq!((held.domain.as_str(), held.node.as_str()), ("domains/vm", "nodes/a"));
    assert_eq!(held.disks.len(), 1);
    assert_eq!((held.disks[0].size_bytes, held.disks[0].allocated_bytes), (2 * MIB, MIB));
    for (domain, count) in [("", 1), ("domains/vm", 1), ("domains/other", 0)] {
        let list = ListSnapshotsRequest { domain: domain.into(), ..Default::default() };
        let list = client.list_snapshots(list).await.unwrap().into_inner();
        assert_eq!(list.snapshots.len(), count, "{domain}");
    }

    let all = read(&world, vec![spec(&name, 0)]).await.unwrap();
    assert_eq!(all[0].size_bytes, 2 * MIB);
    assert_eq!((all[1].offset, all[1].digest.len()), (MIB, 0), "a sign of life is passed on");
    assert_eq!((all[2].offset, all[2].data.len()), (MIB, 1 << 20));
    let messages = vec![spec(&name, 0), known(0, &[0; 32]), known(1, &DIGEST)];
    let changed = read(&world, messages).await.unwrap();
    assert!(changed[2].data.is_empty() && changed[2].digest == DIGEST.as_slice());

    let volume = GetVolumeRequest { name: "volumes/vm-0".into() };
    let before = volumes(&world).get_volume(volume.clone()).await.unwrap().into_inner();
    let restore = RestoreSnapshotRequest { name: name.clone(), ..Default::default() };
    let operation = client.restore_snapshot(restore).await.unwrap().into_inner();
    let done = world.controllers.client(1).wait(&operation.name).await;
    assert_eq!(done.state(), OperationState::Succeeded, "{done:?}");
    let after = volumes(&world).get_volume(volume).await.unwrap().into_inner();
    assert_ne!(before.uid, after.uid);

    let old = DeleteSnapshotRequest { name: name.clone(), etag: "1".into() };
    assert_eq!(client.delete_snapshot(old).await.unwrap_err().code(), Code::Aborted);
    let etag = client.get_snapshot(get.clone()).await.unwrap().into_inner().etag;
    client.delete_snapshot(DeleteSnapshotRequest { name, etag }).await.unwrap();
    assert_eq!(client.get_snapshot(get).await.unwrap_err().code(), Code::NotFound);
}

/// I7: the field, and what is accepted.
#[tokio::test(flavor = "multi_thread")]
async fn bad_input_about_snapshots_is_refused_with_its_field() {
    let world = stopped().await;
    take(&world).await;
    let mut client = snapshots(&world);
    let is_about = |status: &Status, field: &str| {
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field, "{status}");
    };
    for (name, domain, field) in [
        ("one", "domains/vm", "name"),
        ("snapshots/a/b", "domains/vm", "name"),
        ("snapshots/two", "vm", "domain"),
        ("snapshots/two", "", "domain"),
    ] {
        let request = CreateSnapshotRequest {
            name: name.into(),
            domain: domain.into(),
            ..CreateSnapshotRequest::default()
        };
        is_about(&client.create_snapshot(request).await.unwrap_err(), field);
    }
    let missing = GetSnapshotRequest { name: "snapshots/two".into() };
    assert_eq!(client.get_snapshot(missing).await.unwrap_err().code(), Code::NotFound);
    let name = "snapshots/one";
    for (messages, field) in [
        (vec![], "message"),
        (vec![known(0, &DIGEST)], "message"),
        (vec![spec("one", 0)], "spec.name"),
        (vec![spec(name, 1)], "spec.disk"),
        (vec![spec(name, 0), spec(name, 0)], "message"),
        (vec![spec(name, 0), known(0, &[0; 31])], "known.digests"),
        (vec![spec(name, 0), known(0, &[])], "known.digests"),
        (vec![spec(name, 0), known(2, &DIGEST)], "known.first_block"),
        (vec![spec(name, 0), known(1, &DIGEST), known(1, &DIGEST)], "known.first_block"),
    ] {
        let refused = read(&world, messages).await.unwrap_err();
        is_about(&refused, field);
    }
    let none = read(&world, vec![spec("snapshots/two", 0)]).await.unwrap_err();
    assert_eq!(none.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_made_given_taken_and_deleted() {
    let world = stopped().await;
    let mut client = volumes(&world);
    let volume = Volume { name: "volumes/data".into(), size_bytes: MIB, ..Volume::default() };
    let request = CreateVolumeRequest { volume: Some(volume.clone()), ..Default::default() };
    let operation = client.create_volume(request.clone()).await.unwrap().into_inner();
    assert_eq!(operation.target, "volumes/data");
    let done = world.controllers.client(1).wait(&operation.name).await;
    assert_eq!(done.state(), OperationState::Succeeded, "{done:?}");
    let taken = client.create_volume(request).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);

    let name = "volumes/data".to_owned();
    let attach = AttachVolumeRequest {
        name: name.clone(),
        domain: "domains/vm".into(),
        read_only: true,
        ..AttachVolumeRequest::default()
    };
    let held = client.attach_volume(attach).await.unwrap().into_inner();
    assert_eq!((held.domain.as_str(), held.node.as_str()), ("domains/vm", "nodes/a"));
    assert_eq!(held.state(), VolumeState::Ready);
    let spec = world.controllers.client(1).domain("vm").await.spec.unwrap();
    assert!(spec.disks.len() == 2 && spec.disks[1].volume == name && spec.disks[1].read_only);
    let delete = DeleteVolumeRequest { name: name.clone(), etag: String::new() };
    let refused = client.delete_volume(delete.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let detach = DetachVolumeRequest { name, etag: String::new() };
    let held = client.detach_volume(detach).await.unwrap().into_inner();
    assert_eq!((held.domain.as_str(), held.node.as_str()), ("", "nodes/a"));
    client.delete_volume(delete).await.unwrap();

    for (bad, node, field) in [
        (Volume { name: "data".into(), ..volume.clone() }, "", "volume.name"),
        (Volume { size_bytes: 5, ..volume.clone() }, "", "volume.size_bytes"),
        (Volume { size_bytes: 0, ..volume.clone() }, "", "volume.size_bytes"),
        (Volume { pool: "a/b".into(), ..volume.clone() }, "", "volume.pool"),
        (Volume { image: "debian".into(), ..volume.clone() }, "", "volume.image"),
        (volume.clone(), "a", "node"),
    ] {
        let request = CreateVolumeRequest {
            volume: Some(bad),
            node: node.into(),
            ..CreateVolumeRequest::default()
        };
        let refused = client.create_volume(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().starts_with(field), "{refused}");
    }
    let request = CreateVolumeRequest {
        volume: Some(Volume { size_bytes: 1 << 40, ..volume }),
        ..CreateVolumeRequest::default()
    };
    let refused = client.create_volume(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().starts_with("no node can take it: a: needs"), "{refused}");
}
