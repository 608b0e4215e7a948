//! `drover.v1.ClusterService`.

use drover_proto::v1::cluster_service_server::ClusterService;
use drover_proto::v1::{
    BalanceClusterRequest, BalancePlan, ClusterStatus, DomainState, GetStatusRequest, Member,
    NodeState, Operation, PlanBalanceRequest,
};
use tonic::{Request, Response, Status};

use super::errors::invalid;
use super::service::Service;
use super::validate;
use crate::model::{DomainRecord, NodeRecord, OperationRecord, is_active};
use crate::workflows::{Refusal, drain};

const MOVES_DEFAULT: u32 = 5;
const MOVES_MAX: u32 = 100;

#[tonic::async_trait]
impl ClusterService for Service {
    async fn get_status(
        &self,
        _request: Request<GetStatusRequest>,
    ) -> Result<Response<ClusterStatus>, Status> {
        // What this member has, without asking anybody: it may be all there is.
        let status = self.store.status();
        let view = self.store.view();
        let members = status.members.iter().map(|member| Member {
            id: member.id,
            address: member.address.clone(),
            reachable: member.reachable,
            applied_index: member.index.unwrap_or(0),
            role: member.role.name().into(),
        });
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let nodes: Vec<_> = view.all::<NodeRecord>().collect();
        let in_state = |state| count(nodes.iter().filter(|row| row.value.state() == state).count());
        let domains: Vec<_> = view.all::<DomainRecord>().collect();
        let running = domains.iter().filter(|row| {
            matches!(row.value.state(), DomainState::Running | DomainState::Migrating)
        });
        let active = view.all::<OperationRecord>().filter(|row| is_active(&row.value));
        Ok(Response::new(ClusterStatus {
            cluster_id: self.cluster_id.clone(),
            leader_id: status.leader.unwrap_or(0),
            term: status.term,
            revision: view.revision(),
            members: members.collect(),
            answered_by: self.member,
            nodes_ready: in_state(NodeState::Ready),
            nodes_lost: in_state(NodeState::Lost),
            domains_running: count(running.count()),
            domains_total: count(domains.len()),
            operations_active: count(active.count()),
        }))
    }

    async fn plan_balance(
        &self,
        request: Request<PlanBalanceRequest>,
    ) -> Result<Response<BalancePlan>, Status> {
        let moves_max = moves(request.get_ref().moves_max)?;
        let plan = self.look(|cx| Ok(drain::propose_balance(cx, moves_max))).await?;
        Ok(Response::new(BalancePlan {
            moves: plan.moves.iter().map(drain::balance_move).collect(),
            imbalance_before: plan.before,
            imbalance_after: plan.after,
        }))
    }

    async fn balance_cluster(
        &self,
        request: Request<BalanceClusterRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let moves_max = moves(request.moves_max)?;
        let limits = validate::limits(request.limits.as_ref())?;
        let operation = self
            .begin("BalanceCluster", &request_id, &request, |cx| {
                drain::begin_balance(cx, moves_max, &limits)
            })
            .await?;
        Ok(Response::new(operation))
    }
}

fn moves(asked: u32) -> Result<usize, Refusal> {
    if asked > MOVES_MAX {
        let expected = format!("0 to {MOVES_MAX}; 0 means {MOVES_DEFAULT}");
        return Err(invalid("moves_max", &asked.to_string(), &expected));
    }
    let moves = if asked == 0 { MOVES_DEFAULT } else { asked };
    Ok(usize::try_from(moves).unwrap_or(usize::MAX))
}
