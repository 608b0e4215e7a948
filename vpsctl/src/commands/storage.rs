//! `vpsctl pool` and `vpsctl volume`.

use std::time::SystemTime;

use drover_proto::v1::{
    AttachVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, DetachVolumeRequest,
    GetVolumeRequest, ListPoolsRequest, ListVolumesRequest, Operation, Volume,
    pool_service_client::PoolServiceClient, volume_service_client::VolumeServiceClient,
};

use super::{Context, all_pages, call, domain::follow, request_id};
use crate::{
    args::{CreateVolumeArgs, PoolCommand, VolumeCommand},
    error::Error,
    out::{human::short, json, pages},
    wait,
};

pub(super) async fn pool(context: &Context, command: PoolCommand) -> Result<(), Error> {
    let PoolCommand::List { node } = command;
    let request = ListPoolsRequest { node: node.unwrap_or_default() };
    let answer = call!(context, PoolServiceClient::list_pools, request)?;
    context.answer(|| json::array(&answer.pools), || pages::pools(&answer.pools))
}

pub(super) async fn volume(context: &Context, command: VolumeCommand) -> Result<(), Error> {
    match command {
        VolumeCommand::List { domain } => {
            let request =
                ListVolumesRequest { domain: domain.unwrap_or_default(), ..Default::default() };
            let volumes = all_pages!(context, VolumeServiceClient::list_volumes, request, volumes);
            let page = || pages::volumes(&volumes, SystemTime::now());
            context.answer(|| json::array(&volumes), page)
        }
        VolumeCommand::Show(name) => {
            let request = GetVolumeRequest { name: name.volume };
            let volume = call!(context, VolumeServiceClient::get_volume, request)?;
            context.answer(|| json::object(&volume), || pages::volume(&volume, SystemTime::now()))
        }
        VolumeCommand::Create(args) => create(context, args).await,
        VolumeCommand::Delete(name) => {
            let request = DeleteVolumeRequest { name: name.volume.clone(), etag: String::new() };
            call!(context, VolumeServiceClient::delete_volume, request)?;
            context.gone(&name.volume, &format!("{} is deleted", short(&name.volume)))
        }
        VolumeCommand::Attach { name, domain, read_only, limits } => {
            let request = AttachVolumeRequest {
                name: name.volume,
                domain: domain.domain,
                read_only,
                etag: String::new(),
                limits,
            };
            let volume = call!(context, VolumeServiceClient::attach_volume, request)?;
            plugged(context, &volume).await?;
            let what = format!("is the last disk of {} now", short(&volume.domain));
            changed(context, &volume, &what)
        }
        VolumeCommand::Detach(name) => {
            let request = DetachVolumeRequest { name: name.volume, etag: String::new() };
            let volume = call!(context, VolumeServiceClient::detach_volume, request)?;
            plugged(context, &volume).await?;
            let what = format!("belongs to no domain now and stays on {}", short(&volume.node));
            changed(context, &volume, &what)
        }
    }
}

/// Waits for the guest of a domain that runs.
async fn plugged(context: &Context, volume: &Volume) -> Result<(), Error> {
    if volume.operation.is_empty() {
        return Ok(());
    }
    let operation = Operation { name: volume.operation.clone(), ..Operation::default() };
    let ended = wait::finished(&context.cluster, operation).await?;
    wait::succeeded(ended).map(drop)
}

fn changed(context: &Context, volume: &Volume, what: &str) -> Result<(), Error> {
    context.answer(|| json::object(volume), || format!("{} {what}\n", short(&volume.name)))
}

async fn create(context: &Context, args: CreateVolumeArgs) -> Result<(), Error> {
    let volume = Volume {
        name: args.name.volume,
        pool: args.pool.unwrap_or_default(),
        size_bytes: args.size.unwrap_or_default(),
        image: args.image.unwrap_or_default(),
        ..Volume::default()
    };
    let request = CreateVolumeRequest {
        volume: Some(volume),
        node: args.node.unwrap_or_default(),
        request_id: request_id(),
    };
    let operation = call!(context, VolumeServiceClient::create_volume, request)?;
    follow(context, operation, &args.detach).await
}
