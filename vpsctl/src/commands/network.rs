//! `vpsctl network`.

use std::time::SystemTime;

use drover_proto::v1::{
    CreateNetworkRequest, DeleteNetworkRequest, GetNetworkRequest, ListNetworksRequest, Network,
    network_service_client::NetworkServiceClient,
};

use super::{Context, all_pages, call, request_id};
use crate::{
    args::{CreateNetworkArgs, NetworkCommand},
    error::Error,
    out::{human::short, json, pages},
};

pub(super) async fn run(context: &Context, command: NetworkCommand) -> Result<(), Error> {
    match command {
        NetworkCommand::Create(args) => {
            let request =
                CreateNetworkRequest { network: Some(wanted(args)), request_id: request_id() };
            let network = call!(context, NetworkServiceClient::create_network, request)?;
            let page = || {
                let (name, total) = (short(&network.name), network.addresses_total);
                format!("{name} is created: {total} addresses to give away\n")
            };
            context.answer(|| json::object(&network), page)
        }
        NetworkCommand::List => {
            let request = ListNetworksRequest::default();
            let networks =
                all_pages!(context, NetworkServiceClient::list_networks, request, networks);
            let page = || pages::networks(&networks, SystemTime::now());
            context.answer(|| json::array(&networks), page)
        }
        NetworkCommand::Show(name) => {
            let request = GetNetworkRequest { name: name.network };
            let network = call!(context, NetworkServiceClient::get_network, request)?;
            let page = || pages::network(&network, SystemTime::now());
            context.answer(|| json::object(&network), page)
        }
        NetworkCommand::Delete(name) => {
            let request = DeleteNetworkRequest {
                name: name.network.clone(),
                etag: String::new(),
                request_id: request_id(),
            };
            call!(context, NetworkServiceClient::delete_network, request)?;
            context.gone(&name.network, &format!("{} is deleted", short(&name.network)))
        }
    }
}

fn wanted(args: CreateNetworkArgs) -> Network {
    Network {
        name: args.name.network,
        subnet: args.subnet,
        gateway: args.gateway.unwrap_or_default(),
        name_servers: args.dns,
        first_address: args.first.unwrap_or_default(),
        last_address: args.last.unwrap_or_default(),
        bridge: args.bridge.unwrap_or_default(),
        ..Network::default()
    }
}
