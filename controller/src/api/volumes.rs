//! `drover.v1.PoolService` and `drover.v1.VolumeService`: pools as they are, volumes as domains
//! have them, and those that no domain has.

use drover_proto::v1::pool_service_server::PoolService;
use drover_proto::v1::volume_service_server::VolumeService;
use drover_proto::v1::{
    AttachVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, DeleteVolumeResponse,
    DetachVolumeRequest, GetVolumeRequest, ListPoolsRequest, ListPoolsResponse, ListVolumesRequest,
    ListVolumesResponse, Operation, Pool, Volume, VolumeState,
};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::errors::Fault;
use super::service::{CALL_WAIT, Service};
use super::{page, validate};
use crate::model::{DomainId, NodeId, Observed, OperationId, VolumeId, VolumeRecord, World};
use crate::store::Versioned;
use crate::workflows::Refusal;
use crate::workflows::begin::etag;
use crate::workflows::volumes::{self, Attached, NewVolume};

#[tonic::async_trait]
impl PoolService for Service {
    async fn list_pools(
        &self,
        request: Request<ListPoolsRequest>,
    ) -> Result<Response<ListPoolsResponse>, Status> {
        let only = validate::maybe_node("node", &request.get_ref().node)?;
        let world = World::load(&self.read().await?);
        if let Some(only) = &only
            && !world.nodes.contains_key(only)
        {
            return Err(Refusal::NotFound { name: only.name() }.into());
        }
        let observed = self.hub.observed();
        let shared = world.promised_shared();
        let mut pools = Vec::new();
        for (node, seen) in &observed.nodes {
            let known = world.nodes.contains_key(node);
            if !known || only.as_ref().is_some_and(|only| only != node) {
                continue;
            }
            let promised = world.promised(node);
            pools.extend(seen.pools.values().map(|pool| {
                let inside = seen.volumes.values().filter(|volume| volume.pool == pool.id);
                let uid = pool.shared_uid.as_str();
                let others = world.sharers(uid).filter(|other| *other != node && !uid.is_empty());
                Pool {
                    name: format!("{}/pools/{}", node.name(), pool.id),
                    kind: pool.kind,
                    state: pool.state,
                    state_reason: pool.state_reason.clone(),
                    size_bytes: pool.size_bytes,
                    used_bytes: pool.used_bytes,
                    promised_bytes: match uid {
                        "" => promised.get(&pool.id).copied().unwrap_or_default(),
                        uid => shared.get(uid).map_or(0, |shared| shared.bytes),
                    },
                    overcommit: pool.overcommit,
                    volume_count: match uid {
                        "" => u32::try_from(inside.count()).unwrap_or(u32::MAX),
                        uid => shared.get(uid).map_or(0, |shared| shared.volumes),
                    },
                    shared_uid: uid.to_owned(),
                    shared_with: others.map(NodeId::name).collect(),
                }
            }));
        }
        Ok(Response::new(ListPoolsResponse { pools }))
    }
}

#[tonic::async_trait]
impl VolumeService for Service {
    async fn get_volume(
        &self,
        request: Request<GetVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let id = validate::volume("name", &request.get_ref().name)?;
        Ok(Response::new(self.volume(&id).await?))
    }

    async fn list_volumes(
        &self,
        request: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size);
        let domain = match request.domain.as_str() {
            "" => None,
            name => Some(validate::domain("domain", name)?),
        };
        let filter = format!("volumes of {}", request.domain);
        let after = page::after(&request.page_token, &filter)?;
        let view = self.read().await?;
        let of_domain = |row: &Versioned<VolumeRecord>| {
            domain.as_ref().is_none_or(|domain| row.value.domain == domain.as_str())
        };
        let rows = view.list::<VolumeRecord>("", &after, usize::MAX);
        let rows: Vec<_> = rows.into_iter().filter(of_domain).take(size + 1).collect();
        let (rows, next_page_token) = page::cut(rows, size, &filter, |row| row.value.id.clone());
        let (world, observed) = (World::load(&view), self.hub.observed());
        let volumes = rows.iter().map(|row| present(row, &world, &observed)).collect();
        Ok(Response::new(ListVolumesResponse { volumes, next_page_token }))
    }

    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let given = request.volume.clone().unwrap_or_default();
        validate::volume_spec("volume", &given.pool, given.size_bytes, &given.image)?;
        let new = NewVolume {
            id: validate::volume("volume.name", &given.name)?,
            pool: given.pool,
            size_bytes: given.size_bytes,
            image: given.image,
            only: validate::maybe_node("node", &request.node)?,
        };
        let operation = self
            .begin("CreateVolume", &request_id, &request, |cx| volumes::create_volume(cx, &new))
            .await?;
        Ok(Response::new(operation))
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = validate::volume("name", &request.name)?;
        self.decide(Instant::now() + CALL_WAIT, |cx, _| {
            Ok((volumes::delete_volume(cx, &id, &request.etag)?, ()))
        })
        .await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn attach_volume(
        &self,
        request: Request<AttachVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let AttachVolumeRequest { name, domain, read_only, etag, limits } = request.into_inner();
        let id = validate::volume("name", &name)?;
        let domain = validate::domain("domain", &domain)?;
        if let Some(limits) = &limits {
            validate::disk_limits("limits", limits)?;
        }
        let how = Attached { read_only, limits };
        self.decide(Instant::now() + CALL_WAIT, |cx, _| {
            Ok((volumes::attach_volume(cx, &id, &domain, &how, &etag)?, ()))
        })
        .await?;
        Ok(Response::new(self.volume(&id).await?))
    }

    async fn detach_volume(
        &self,
        request: Request<DetachVolumeRequest>,
    ) -> Result<Response<Volume>, Status> {
        let request = request.into_inner();
        let id = validate::volume("name", &request.name)?;
        self.decide(Instant::now() + CALL_WAIT, |cx, _| {
            Ok((volumes::detach_volume(cx, &id, &request.etag)?, ()))
        })
        .await?;
        Ok(Response::new(self.volume(&id).await?))
    }
}

impl Service {
    async fn volume(&self, id: &VolumeId) -> Result<Volume, Fault> {
        let view = self.read().await?;
        let row = view
            .get::<VolumeRecord>(id.as_str())
            .ok_or_else(|| Refusal::NotFound { name: id.name() })?;
        Ok(present(&row, &World::load(&view), &self.hub.observed()))
    }
}

/// The operation in which a running domain's guest gets the volume or lets go of it.
fn plugged_by(world: &World, domain: &DomainId, record: &VolumeRecord) -> String {
    let held = world.domains.get(domain).map(|row| row.value.operation.as_str());
    let held = held.and_then(|id| world.operation(&OperationId::trusted(id)));
    let its = held.filter(|held| held.volume == record.id);
    its.map(|held| format!("operations/{}", held.id)).unwrap_or_default()
}

fn present(row: &Versioned<VolumeRecord>, world: &World, observed: &Observed) -> Volume {
    let record = &row.value;
    let domain = DomainId::trusted(&record.domain);
    // Its domain's, or where it was left.
    let node = world.domains.get(&domain).map_or(&record.node, |row| &row.value.node).clone();
    let said = observed.volume(&node, &record.uid);
    let creating = record.state() == VolumeState::Creating;
    let full = |collection: &str, id: &str| match id {
        "" => String::new(),
        id => format!("{collection}/{id}"),
    };
    Volume {
        name: format!("volumes/{}", record.id),
        uid: record.uid.clone(),
        state: record.state,
        state_reason: match said.filter(|_| creating) {
            Some(said) => said.state_reason.clone(),
            None => record.state_reason.clone(),
        },
        domain: full("domains", &record.domain),
        node: full("nodes", &node),
        pool: record.pool.clone(),
        size_bytes: record.size_bytes,
        allocated_bytes: said.map_or(0, |said| said.allocated_bytes),
        image: full("images", &record.image),
        create_time: record.create_time,
        etag: etag(row.mod_revision),
        operation: plugged_by(world, &domain, record),
    }
}
