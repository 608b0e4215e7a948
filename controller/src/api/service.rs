//! What every call has: the store, the reports, and the two ways to use them.

use std::sync::Arc;
use std::time::Duration;

use drover_proto::MESSAGE_BYTES_MAX;
use drover_proto::agent::v1::session_service_server::SessionServiceServer;
use drover_proto::v1::cluster_service_server::ClusterServiceServer;
use drover_proto::v1::domain_service_server::DomainServiceServer;
use drover_proto::v1::event_service_server::EventServiceServer;
use drover_proto::v1::image_service_server::ImageServiceServer;
use drover_proto::v1::network_service_server::NetworkServiceServer;
use drover_proto::v1::node_service_server::NodeServiceServer;
use drover_proto::v1::operation_service_server::OperationServiceServer;
use drover_proto::v1::pool_service_server::PoolServiceServer;
use drover_proto::v1::snapshot_service_server::SnapshotServiceServer;
use drover_proto::v1::volume_service_server::VolumeServiceServer;
use tokio::time::Instant;

use super::errors::Fault;
use super::forward::Forwarder;
use crate::model::World;
use crate::scheduler::Strategy;
use crate::session::{Hub, Sessions};
use crate::store::{CommitError, MemberId, Revision, Store, Txn, View};
use crate::workflows::{Context, RandomIds, Settings};

/// A call is decided within this.
pub(super) const CALL_WAIT: Duration = Duration::from_secs(10);
/// A decision is made anew so often when rows change under it.
const TRIES_MAX: usize = 20;

/// Shared by all calls; cheap to clone.
#[derive(Clone)]
pub struct Service {
    /// The rows.
    pub store: Store,
    /// The reports.
    pub hub: Arc<Hub>,
    /// Leases and intervals.
    pub settings: Settings,
    /// Which cluster this is.
    pub cluster_id: String,
    /// Which member this is.
    pub member: MemberId,
    /// How nodes are ranked.
    pub strategy: Strategy,
}

/// How a member is set up.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// Which cluster this is; agents of another one are refused.
    pub cluster_id: String,
    /// Which member this is.
    pub member: MemberId,
    /// Leases and intervals.
    pub settings: Settings,
    /// How nodes are ranked.
    pub strategy: Strategy,
}

impl Service {
    /// Over a store and a hub; [`routes`] serves it.
    #[must_use]
    pub fn new(store: Store, hub: Arc<Hub>, options: ServiceOptions) -> Self {
        let ServiceOptions { cluster_id, member, settings, strategy } = options;
        Self { store, hub, settings, cluster_id, member, strategy }
    }

    /// Rows that show everything acknowledged before the call.
    ///
    /// # Errors
    /// No leader could vouch for them in time.
    pub async fn read(&self) -> Result<View, Fault> {
        self.store.barrier(Instant::now() + CALL_WAIT).await?;
        Ok(self.store.view())
    }

    /// Decides on the rows as they are, and commits. When they change meanwhile, `decide` is
    /// asked again. An empty transaction changes nothing and is fine.
    ///
    /// # Errors
    /// `decide` refuses, or the commit fails.
    pub async fn decide<T>(
        &self,
        deadline: Instant,
        mut decide: impl FnMut(&Context<'_>, &View) -> Result<(Txn, T), Fault>,
    ) -> Result<(Revision, T), Fault> {
        for _ in 0..TRIES_MAX {
            self.store.barrier(deadline).await?;
            let leadership = self.store.leadership().borrow().clone();
            if !leadership.is_leader {
                let leader_address = leadership.leader_address;
                return Err(Fault::NotLeading { leader_address });
            }
            let view = self.store.view();
            let world = World::load(&view);
            let observed = self.hub.observed();
            let cx = Context {
                world: &world,
                observed: &observed,
                now: self.hub.now(),
                term: leadership.term,
                leader_since_ms: 0,
                settings: &self.settings,
                ids: &RandomIds,
            };
            let (txn, answer) = decide(&cx, &view)?;
            if txn.is_empty() {
                return Ok((view.revision(), answer));
            }
            match self.store.commit(txn, deadline).await {
                Ok(revision) => return Ok((revision, answer)),
                Err(CommitError::Guard { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Fault::Contended)
    }
}

/// All services of the API and the agents' sessions, to be added to a server.
#[must_use]
pub fn routes(service: &Service) -> tonic::service::Routes {
    let forwarder = Forwarder::new(service.store.clone(), service.member);
    tonic::service::Routes::new(forwarder.wrap(NodeServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(DomainServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(PoolServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(VolumeServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(SnapshotServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(ImageServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(NetworkServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(OperationServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(EventServiceServer::new(service.clone())))
        .add_service(forwarder.wrap(ClusterServiceServer::new(service.clone())))
        .add_service(
            SessionServiceServer::new(Sessions::new(service.clone()))
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
}
