//! `vpsctl snapshot`.

use std::time::SystemTime;

use drover_proto::v1::{
    CreateSnapshotRequest, DeleteSnapshotRequest, GetSnapshotRequest, ListSnapshotsRequest,
    RestoreSnapshotRequest, Snapshot, snapshot_service_client::SnapshotServiceClient,
};

use super::{Context, all_pages, ask::confirm, call, domain::follow, request_id};
use crate::{
    args::SnapshotCommand,
    error::Error,
    out::{human::short, json, pages},
};

pub(super) async fn run(context: &Context, command: SnapshotCommand) -> Result<(), Error> {
    match command {
        SnapshotCommand::Create { domain, name, detach } => {
            let request = CreateSnapshotRequest {
                name: name.snapshot,
                domain: domain.domain,
                request_id: request_id(),
            };
            let operation = call!(context, SnapshotServiceClient::create_snapshot, request)?;
            follow(context, operation, &detach).await
        }
        SnapshotCommand::List { domain } => {
            let request =
                ListSnapshotsRequest { domain: domain.unwrap_or_default(), ..Default::default() };
            let snapshots =
                all_pages!(context, SnapshotServiceClient::list_snapshots, request, snapshots);
            let page = || pages::snapshots(&snapshots, SystemTime::now());
            context.answer(|| json::array(&snapshots), page)
        }
        SnapshotCommand::Show(name) => {
            let snapshot = get(context, &name.snapshot).await?;
            let page = || pages::snapshot(&snapshot, SystemTime::now());
            context.answer(|| json::object(&snapshot), page)
        }
        SnapshotCommand::Restore { name, yes, detach } => {
            let id = short(&name.snapshot);
            confirm(yes, &format!("what the disks of {id}'s domain hold now is lost"))?;
            let request =
                RestoreSnapshotRequest { name: name.snapshot.clone(), request_id: request_id() };
            let operation = call!(context, SnapshotServiceClient::restore_snapshot, request)?;
            follow(context, operation, &detach).await
        }
        SnapshotCommand::Delete { name, yes } => {
            let id = short(&name.snapshot);
            confirm(yes, &format!("snapshot {id} is lost"))?;
            delete(context, &name.snapshot).await?;
            context.gone(&name.snapshot, &format!("{id} is deleted"))
        }
    }
}

pub(super) async fn get(context: &Context, name: &str) -> Result<Snapshot, Error> {
    let request = GetSnapshotRequest { name: name.to_owned() };
    call!(context, SnapshotServiceClient::get_snapshot, request)
}

pub(super) async fn delete(context: &Context, name: &str) -> Result<(), Error> {
    let request = DeleteSnapshotRequest { name: name.to_owned(), etag: String::new() };
    call!(context, SnapshotServiceClient::delete_snapshot, request).map(|_| ())
}
