//! `drover.v1.NetworkService`.

use drover_proto::v1::network_service_server::NetworkService;
use drover_proto::v1::{
    CreateNetworkRequest, DeleteNetworkRequest, DeleteNetworkResponse, GetNetworkRequest,
    ListNetworksRequest, ListNetworksResponse, Network,
};
use tonic::{Request, Response, Status};

use super::errors::Fault;
use super::requests::Call;
use super::service::Service;
use super::{page, validate};
use crate::model::{NetworkId, NetworkRecord, World};
use crate::workflows::{Refusal, network};

#[tonic::async_trait]
impl NetworkService for Service {
    async fn create_network(
        &self,
        request: Request<CreateNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let call = Call::new("CreateNetwork", request_id, &request)?;
        let given = request.network;
        let name = given.as_ref().map_or("", |network| network.name.as_str());
        let id = validate::network_id("network.name", name)?;
        let network = validate::network(given.as_ref())?;
        self.once(&call, |cx| network::create(cx, &id, &network)).await?;
        Ok(Response::new(self.network(&id).await?))
    }

    async fn get_network(
        &self,
        request: Request<GetNetworkRequest>,
    ) -> Result<Response<Network>, Status> {
        let id = validate::network_id("name", &request.get_ref().name)?;
        Ok(Response::new(self.network(&id).await?))
    }

    async fn list_networks(
        &self,
        request: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size);
        let after = page::after(&request.page_token, "networks")?;
        let view = self.read().await?;
        let world = World::load(&view);
        let rows = view.list::<NetworkRecord>("", &after, size + 1);
        let (rows, next_page_token) = page::cut(rows, size, "networks", |row| row.value.id.clone());
        let networks = rows.iter().map(|row| network::present(&world, row)).collect();
        Ok(Response::new(ListNetworksResponse { networks, next_page_token }))
    }

    async fn delete_network(
        &self,
        request: Request<DeleteNetworkRequest>,
    ) -> Result<Response<DeleteNetworkResponse>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let call = Call::new("DeleteNetwork", request_id, &request)?;
        let id = validate::network_id("name", &request.name)?;
        self.once(&call, |cx| network::delete(cx, &id, &request.etag)).await?;
        Ok(Response::new(DeleteNetworkResponse {}))
    }
}

impl Service {
    async fn network(&self, id: &NetworkId) -> Result<Network, Fault> {
        let view = self.read().await?;
        let row = view
            .get::<NetworkRecord>(id.as_str())
            .ok_or_else(|| Refusal::NotFound { name: id.name() })?;
        Ok(network::present(&World::load(&view), &row))
    }
}
