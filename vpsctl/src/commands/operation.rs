//! `vpsctl operation`.

use std::time::SystemTime;

use drover_proto::v1::{
    CancelOperationRequest, GetOperationRequest, ListOperationsRequest, Operation, OperationKind,
    OperationState, operation_service_client::OperationServiceClient,
};

use super::{Context, all_pages, call, node::moves_ended};
use crate::{
    args::OperationCommand,
    error::Error,
    out::{human::operation_title, json, pages},
    wait,
};

pub(super) async fn run(context: &Context, command: OperationCommand) -> Result<(), Error> {
    match command {
        OperationCommand::List { active, target } => {
            let request = ListOperationsRequest {
                target: target.unwrap_or_default(),
                active_only: active,
                ..ListOperationsRequest::default()
            };
            let operations =
                all_pages!(context, OperationServiceClient::list_operations, request, operations);
            let page = || pages::operations(&operations, SystemTime::now());
            context.answer(|| json::array(&operations), page)
        }
        OperationCommand::Show(name) => {
            let request = GetOperationRequest { name: name.operation };
            let operation = call!(context, OperationServiceClient::get_operation, request)?;
            let page = || pages::operation(&operation, SystemTime::now());
            context.answer(|| json::object(&operation), page)
        }
        OperationCommand::Wait(name) => {
            let request = GetOperationRequest { name: name.operation };
            let operation = call!(context, OperationServiceClient::get_operation, request)?;
            let operation = wait::finished(&context.cluster, operation).await?;
            ended(context, operation)
        }
        OperationCommand::Cancel { name, detach } => {
            let request = CancelOperationRequest { name: name.operation };
            let operation = call!(context, OperationServiceClient::cancel_operation, request)?;
            let done = wait::accepted(&context.cluster, operation, &detach, context.json).await?;
            done.map_or(Ok(()), |operation| cancelled(context, operation))
        }
    }
}

/// Prints an operation that has ended, whatever it was; its failure is the command's.
pub(super) fn ended(context: &Context, operation: Operation) -> Result<(), Error> {
    match operation.kind() {
        OperationKind::DrainNode | OperationKind::BalanceCluster => {
            return moves_ended(context, operation);
        }
        OperationKind::MigrateDomain if !context.json && was_live(&operation) => {
            let report = operation.migration.as_ref();
            let page = report.map(|r| pages::migration(&operation.target, r));
            crate::out::print(&page.unwrap_or_default())?;
        }
        _ => {
            let succeeded = operation.state() == OperationState::Succeeded;
            let page = || match succeeded {
                true => pages::done(&operation, SystemTime::now()),
                false => String::new(),
            };
            context.answer(|| json::object(&operation), page)?;
        }
    }
    wait::succeeded(operation).map(|_| ())
}

/// A stopped domain moves without a migration: there is nothing to report.
fn was_live(operation: &Operation) -> bool {
    operation.migration.as_ref().is_some_and(|report| report.memory_bytes > 0)
}

/// Cancelled is what was wanted; an operation that ended otherwise was too late or failed.
fn cancelled(context: &Context, operation: Operation) -> Result<(), Error> {
    let title = operation_title(&operation);
    context.answer(|| json::object(&operation), String::new)?;
    match operation.state() {
        OperationState::Cancelled if context.json => Ok(()),
        OperationState::Cancelled => crate::out::print(&format!("{title}: cancelled\n")),
        OperationState::Succeeded => {
            Err(Error::Conflict(format!("{title}: it was done before it could be cancelled")))
        }
        _ => Err(Error::Failed(Box::new(operation))),
    }
}
