//! `drover.v1.NodeService`.

use std::time::Duration;

use drover_proto::v1::node_service_server::NodeService;
use drover_proto::v1::{
    CordonNodeRequest, DeleteNodeRequest, DeleteNodeResponse, DrainNodeRequest, DrainPlan,
    GetNodeRequest, ListNodesRequest, ListNodesResponse, Node, Operation, PlanDrainRequest,
    UncordonNodeRequest,
};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::errors::Fault;
use super::service::{CALL_WAIT, Service};
use super::{page, present, validate};
use crate::model::{NodeId, NodeRecord, World};
use crate::workflows::desired::duration;
use crate::workflows::{Refusal, drain, nodes};

const DRAIN_DEFAULT: Duration = Duration::from_secs(3600);
const DRAIN_MAX: Duration = Duration::from_secs(24 * 3600);

#[tonic::async_trait]
impl NodeService for Service {
    async fn get_node(&self, request: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        let id = validate::node("name", &request.get_ref().name)?;
        Ok(Response::new(self.node(&id).await?))
    }

    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size);
        let after = page::after(&request.page_token, "nodes")?;
        let view = self.read().await?;
        let rows = view.list::<NodeRecord>("", &after, size + 1);
        let (rows, next_page_token) = page::cut(rows, size, "nodes", |row| row.value.id.clone());
        let (world, observed) = (World::load(&view), self.hub.observed());
        let nodes = rows.iter().map(|row| present::node(row, &world, &observed)).collect();
        Ok(Response::new(ListNodesResponse { nodes, next_page_token }))
    }

    async fn cordon_node(
        &self,
        request: Request<CordonNodeRequest>,
    ) -> Result<Response<Node>, Status> {
        let id = validate::node("name", &request.get_ref().name)?;
        Ok(Response::new(self.set_cordon(&id, true).await?))
    }

    async fn uncordon_node(
        &self,
        request: Request<UncordonNodeRequest>,
    ) -> Result<Response<Node>, Status> {
        let id = validate::node("name", &request.get_ref().name)?;
        Ok(Response::new(self.set_cordon(&id, false).await?))
    }

    async fn plan_drain(
        &self,
        request: Request<PlanDrainRequest>,
    ) -> Result<Response<DrainPlan>, Status> {
        let id = validate::node("name", &request.get_ref().name)?;
        let limits = validate::limits(None)?;
        let plan = self.look(|cx| drain::propose_drain(cx, &id, &limits, self.strategy)).await?;
        let moves = plan.moves.iter().map(|line| drain::planned_move(line, &id)).collect();
        Ok(Response::new(DrainPlan {
            node: id.name(),
            moves,
            expected_time: Some(duration(validate::ms(plan.expected_time))),
            parallel_moves: plan.parallel,
        }))
    }

    async fn drain_node(
        &self,
        request: Request<DrainNodeRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::node("name", &request.name)?;
        let given = request.deadline.as_ref();
        let wait = validate::duration("deadline", given, DRAIN_DEFAULT, DRAIN_MAX)?;
        let wait = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        let limits = validate::limits(request.limits.as_ref())?;
        let operation = self
            .begin("DrainNode", &request_id, &request, |cx| {
                drain::begin_drain(cx, &id, &limits, wait, self.strategy)
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn delete_node(
        &self,
        request: Request<DeleteNodeRequest>,
    ) -> Result<Response<DeleteNodeResponse>, Status> {
        let request = request.into_inner();
        let id = validate::node("name", &request.name)?;
        self.decide(Instant::now() + CALL_WAIT, |cx, _| {
            Ok((nodes::delete_node(cx, &id, &request.etag)?, ()))
        })
        .await?;
        Ok(Response::new(DeleteNodeResponse {}))
    }
}

impl Service {
    async fn node(&self, id: &NodeId) -> Result<Node, Fault> {
        let view = self.read().await?;
        let row = view
            .get::<NodeRecord>(id.as_str())
            .ok_or_else(|| Refusal::NotFound { name: id.name() })?;
        Ok(present::node(&row, &World::load(&view), &self.hub.observed()))
    }

    async fn set_cordon(&self, id: &NodeId, cordoned: bool) -> Result<Node, Fault> {
        self.decide(Instant::now() + CALL_WAIT, |cx, _| Ok(nodes::set_cordon(cx, id, cordoned)?))
            .await?;
        self.node(id).await
    }
}
