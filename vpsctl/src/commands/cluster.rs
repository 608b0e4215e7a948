//! `vpsctl cluster`.

use drover_proto::v1::{
    BalanceClusterRequest, GetStatusRequest, PlanBalanceRequest,
    cluster_service_client::ClusterServiceClient,
};

use super::{Context, call, node::moves_ended, request_id};
use crate::{
    args::{BalanceArgs, ClusterCommand},
    error::Error,
    out::{json, pages},
    wait,
};

pub(super) async fn run(context: &Context, command: ClusterCommand) -> Result<(), Error> {
    match command {
        ClusterCommand::Status => status(context).await,
        ClusterCommand::Balance(args) if args.dry_run => plan(context, &args).await,
        ClusterCommand::Balance(args) => balance(context, args).await,
    }
}

async fn status(context: &Context) -> Result<(), Error> {
    let status = call!(context, ClusterServiceClient::get_status, GetStatusRequest {})?;
    context.answer(|| json::object(&status), || pages::cluster(&status))?;
    if status.leader_id == 0 {
        return Err(Error::NoLeader(status.answered_by));
    }
    Ok(())
}

async fn plan(context: &Context, args: &BalanceArgs) -> Result<(), Error> {
    let request = PlanBalanceRequest { moves_max: args.moves_max.unwrap_or_default() };
    let plan = call!(context, ClusterServiceClient::plan_balance, request)?;
    context.answer(|| json::object(&plan), || pages::balance_plan(&plan))
}

async fn balance(context: &Context, args: BalanceArgs) -> Result<(), Error> {
    let request = BalanceClusterRequest {
        request_id: request_id(),
        moves_max: args.moves_max.unwrap_or_default(),
        limits: args.limits.message(),
    };
    let operation = call!(context, ClusterServiceClient::balance_cluster, request)?;
    let ended = wait::accepted(&context.cluster, operation, &args.detach, context.json).await?;
    ended.map_or(Ok(()), |operation| moves_ended(context, operation))
}
