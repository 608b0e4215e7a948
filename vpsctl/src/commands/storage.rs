//! `vpsctl pool` and `vpsctl volume`.

use std::time::SystemTime;

use drover_proto::v1::{
    GetVolumeRequest, ListPoolsRequest, ListVolumesRequest, pool_service_client::PoolServiceClient,
    volume_service_client::VolumeServiceClient,
};

use super::{Context, all_pages, call};
use crate::{
    args::{PoolCommand, VolumeCommand},
    error::Error,
    out::{json, pages},
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
        VolumeCommand::Show { volume } => {
            let request = GetVolumeRequest { name: volume };
            let volume = call!(context, VolumeServiceClient::get_volume, request)?;
            context.answer(|| json::object(&volume), || pages::volume(&volume, SystemTime::now()))
        }
    }
}
