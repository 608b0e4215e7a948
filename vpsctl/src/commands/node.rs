//! `vpsctl node`.

use std::time::SystemTime;

use drover_proto::v1::{
    CordonNodeRequest, DeleteNodeRequest, DrainNodeRequest, GetNodeRequest, ListNodesRequest, Node,
    Operation, OperationState, PlanDrainRequest, UncordonNodeRequest,
    node_service_client::NodeServiceClient,
};

use super::{Context, all_pages, call, request_id};
use crate::{
    args::{DrainArgs, NodeCommand, proto_duration},
    error::Error,
    out::{
        human::{plural, short},
        json, pages,
    },
    wait,
};

pub(super) async fn run(context: &Context, command: NodeCommand) -> Result<(), Error> {
    match command {
        NodeCommand::List => {
            let request = ListNodesRequest::default();
            let nodes = all_pages!(context, NodeServiceClient::list_nodes, request, nodes);
            context.answer(|| json::array(&nodes), || pages::nodes(&nodes, SystemTime::now()))
        }
        NodeCommand::Show(name) => {
            let request = GetNodeRequest { name: name.node };
            let node = call!(context, NodeServiceClient::get_node, request)?;
            context.answer(|| json::object(&node), || pages::node(&node, SystemTime::now()))
        }
        NodeCommand::Cordon(name) => {
            let request = CordonNodeRequest { name: name.node };
            let node = call!(context, NodeServiceClient::cordon_node, request)?;
            changed(context, &node, "is cordoned: it gets no new domains")
        }
        NodeCommand::Uncordon(name) => {
            let request = UncordonNodeRequest { name: name.node };
            let node = call!(context, NodeServiceClient::uncordon_node, request)?;
            changed(context, &node, "takes domains again")
        }
        NodeCommand::Delete(name) => {
            let request = DeleteNodeRequest { name: name.node.clone(), etag: String::new() };
            call!(context, NodeServiceClient::delete_node, request)?;
            context.gone(&name.node, &format!("{} is forgotten", short(&name.node)))
        }
        NodeCommand::Drain(args) if args.dry_run => plan(context, args).await,
        NodeCommand::Drain(args) => drain(context, args).await,
    }
}

fn changed(context: &Context, node: &Node, what: &str) -> Result<(), Error> {
    context.answer(|| json::object(node), || format!("{} {what}\n", short(&node.name)))
}

async fn plan(context: &Context, args: DrainArgs) -> Result<(), Error> {
    let request = PlanDrainRequest { name: args.name.node };
    let plan = call!(context, NodeServiceClient::plan_drain, request)?;
    context.answer(|| json::object(&plan), || pages::drain_plan(&plan))?;
    match pages::blocked(&plan.moves) {
        0 => Ok(()),
        n => {
            Err(Error::Left(format!("{} cannot move; a drain would leave it", plural(n, "domain"))))
        }
    }
}

async fn drain(context: &Context, args: DrainArgs) -> Result<(), Error> {
    let request = DrainNodeRequest {
        name: args.name.node,
        request_id: request_id(),
        deadline: args.deadline.map(proto_duration),
        limits: args.limits.message(),
    };
    let operation = call!(context, NodeServiceClient::drain_node, request)?;
    let ended = wait::accepted(&context.cluster, operation, &args.detach, context.json).await?;
    ended.map_or(Ok(()), |operation| moves_ended(context, operation))
}

/// Prints what became of a drain or a balance; domains that are left are exit code 7.
pub(super) fn moves_ended(context: &Context, operation: Operation) -> Result<(), Error> {
    let succeeded = operation.state() == OperationState::Succeeded;
    let page = || {
        let mut text = String::new();
        if !operation.moves.is_empty() {
            text.push_str(&pages::moves_done(&operation.moves));
        }
        if succeeded {
            text.push_str(&pages::done(&operation, SystemTime::now()));
        }
        text
    };
    context.answer(|| json::object(&operation), page)?;
    let left = pages::left(&operation.moves);
    match wait::succeeded(operation) {
        Ok(_) if left == 0 => Ok(()),
        Ok(_) => Err(Error::Left(format!("{} left, see above", plural(left, "domain")))),
        Err(error) if left == 0 => Err(error),
        Err(error) => Err(Error::Left(error.to_string())),
    }
}
