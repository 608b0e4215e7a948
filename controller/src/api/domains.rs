//! `drover.v1.DomainService`.

use std::time::Duration;

use drover_proto::v1::domain_service_server::DomainService;
use drover_proto::v1::{
    ConsoleInput, CreateDomainRequest, DeleteDomainRequest, Domain, EndRescueRequest,
    GetDomainRequest, GetGuestRequest, Guest, ListDomainsRequest, ListDomainsResponse,
    MigrateDomainRequest, Operation, OperationState, ReinstallDomainRequest, RescueDomainRequest,
    ResizeDomainRequest, SaveDomainRequest, SetGuestPasswordRequest, SetGuestPasswordResponse,
    StartDomainRequest, StopDomainRequest,
};
use tonic::{Request, Response, Status, Streaming};

use super::console::Output;
use super::errors::Fault;
use super::service::Service;
use super::{guest, page, present, validate};
use crate::model::{DomainRecord, NodeId};
use crate::store::Versioned;
use crate::workflows::begin::{self, Begun, NewDomain};
use crate::workflows::{Context, Refusal, reinstall, rescue, resize, save};

const GRACE_DEFAULT: Duration = Duration::from_secs(60);
const GRACE_MAX: Duration = Duration::from_secs(3600);

#[tonic::async_trait]
impl DomainService for Service {
    type AttachConsoleStream = Output;

    async fn create_domain(
        &self,
        request: Request<CreateDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let given = request.domain.clone().unwrap_or_default();
        let id = validate::domain("domain.name", &given.name)?;
        let only = validate::maybe_node("node", &request.node)?;
        let create = |cx: &Context<'_>| -> Result<Begun, Refusal> {
            let (spec, networks) = validate::spec(cx, given.spec.as_ref())?;
            let new = NewDomain {
                id: id.clone(),
                spec,
                networks,
                only: only.clone(),
                leave_stopped: request.leave_stopped,
                strategy: self.strategy,
            };
            begin::create_domain(cx, &new)
        };
        if request.validate_only {
            let begun = self.look(create).await?;
            return Ok(Response::new(unsaved(&begun)));
        }
        let operation = self.begin("CreateDomain", &request_id, &request, create).await?;
        Ok(Response::new(operation))
    }

    async fn get_domain(
        &self,
        request: Request<GetDomainRequest>,
    ) -> Result<Response<Domain>, Status> {
        let id = validate::domain("name", &request.get_ref().name)?;
        let view = self.read().await?;
        let row = view
            .get::<DomainRecord>(id.as_str())
            .ok_or_else(|| Refusal::NotFound { name: id.name() })?;
        Ok(Response::new(present::domain(&row, &self.hub.observed())))
    }

    async fn list_domains(
        &self,
        request: Request<ListDomainsRequest>,
    ) -> Result<Response<ListDomainsResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size);
        let node = validate::maybe_node("node", &request.node)?;
        let filter = format!("domains on {}", request.node);
        let after = page::after(&request.page_token, &filter)?;
        let view = self.read().await?;
        let on = |row: &Versioned<DomainRecord>| {
            node.as_ref().is_none_or(|node| row.value.node == node.as_str())
        };
        let rows: Vec<_> = match &node {
            None => view.list::<DomainRecord>("", &after, size + 1),
            Some(_) => {
                let rows = view.list::<DomainRecord>("", &after, usize::MAX);
                rows.into_iter().filter(on).take(size + 1).collect()
            }
        };
        let (rows, next_page_token) = page::cut(rows, size, &filter, |row| row.value.id.clone());
        let observed = self.hub.observed();
        let domains = rows.iter().map(|row| present::domain(row, &observed)).collect();
        Ok(Response::new(ListDomainsResponse { domains, next_page_token }))
    }

    async fn delete_domain(
        &self,
        request: Request<DeleteDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let operation = self
            .begin("DeleteDomain", &request_id, &request, |cx| {
                begin::delete_domain(cx, &id, &request.etag, request.force)
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn start_domain(
        &self,
        request: Request<StartDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let operation = self
            .begin("StartDomain", &request_id, &request, |cx| {
                begin::start_domain(cx, &id, request.discard_saved)
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn stop_domain(
        &self,
        request: Request<StopDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let given = request.grace_period.as_ref();
        let grace = validate::duration("grace_period", given, GRACE_DEFAULT, GRACE_MAX)?;
        let grace_ms = if request.force { 0 } else { validate::ms(grace) };
        let operation = self
            .begin("StopDomain", &request_id, &request, |cx| begin::stop_domain(cx, &id, grace_ms))
            .await?;
        Ok(Response::new(operation))
    }

    async fn migrate_domain(
        &self,
        request: Request<MigrateDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let to: Option<NodeId> = validate::maybe_node("to_node", &request.to_node)?;
        let limits = validate::limits(request.limits.as_ref())?;
        let operation = self
            .begin("MigrateDomain", &request_id, &request, |cx| {
                begin::migrate_domain(cx, &id, to.as_ref(), &limits)
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn resize_domain(
        &self,
        request: Request<ResizeDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let resize = validate::resize(&request)?;
        let operation = self
            .begin("ResizeDomain", &request_id, &request, |cx| {
                resize::resize_domain(cx, &id, &resize)
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn reinstall_domain(
        &self,
        request: Request<ReinstallDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let image = match request.image.as_str() {
            "" => None,
            name => Some(validate::image("image", name)?),
        };
        let operation = self
            .begin("ReinstallDomain", &request_id, &request, |cx| {
                reinstall::reinstall_domain(
                    cx,
                    &id,
                    request.disk,
                    image.as_ref(),
                    request.keep_image,
                )
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn rescue_domain(
        &self,
        request: Request<RescueDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let image = validate::image("image", &request.image)?;
        let operation = self
            .begin("RescueDomain", &request_id, &request, |cx| {
                rescue::rescue_domain(cx, &id, &image)
            })
            .await?;
        Ok(Response::new(operation))
    }

    async fn end_rescue(
        &self,
        request: Request<EndRescueRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let operation = self
            .begin("EndRescue", &request_id, &request, |cx| rescue::end_rescue(cx, &id))
            .await?;
        Ok(Response::new(operation))
    }

    async fn save_domain(
        &self,
        request: Request<SaveDomainRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let request_id = std::mem::take(&mut request.request_id);
        let id = validate::domain("name", &request.name)?;
        let operation = self
            .begin("SaveDomain", &request_id, &request, |cx| save::save_domain(cx, &id))
            .await?;
        Ok(Response::new(operation))
    }

    async fn get_guest(
        &self,
        request: Request<GetGuestRequest>,
    ) -> Result<Response<Guest>, Status> {
        let said = self.call_guest(&request.get_ref().name, guest::get()).await?;
        Ok(Response::new(said.guest.unwrap_or_default()))
    }

    async fn set_guest_password(
        &self,
        request: Request<SetGuestPasswordRequest>,
    ) -> Result<Response<SetGuestPasswordResponse>, Status> {
        let mut request = request.into_inner();
        let name = std::mem::take(&mut request.name);
        self.call_guest(&name, guest::set_password(request)?).await?;
        Ok(Response::new(SetGuestPasswordResponse {}))
    }

    async fn attach_console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Output>, Status> {
        self.console(request.into_inner()).await.map(Response::new)
    }
}

impl Service {
    /// Decides as a change would, and changes nothing.
    pub(super) async fn look<T>(
        &self,
        decide: impl Fn(&Context<'_>) -> Result<T, Refusal>,
    ) -> Result<T, Fault> {
        use crate::model::World;
        use crate::workflows::RandomIds;
        let view = self.read().await?;
        let (world, observed) = (World::load(&view), self.hub.observed());
        let cx = Context {
            world: &world,
            observed: &observed,
            now: self.hub.now(),
            term: self.store.leadership().borrow().term,
            leader_since_ms: 0,
            settings: &self.settings,
            ids: &RandomIds,
        };
        Ok(decide(&cx)?)
    }
}

/// What was checked and placed, but not written: it has no name.
fn unsaved(begun: &Begun) -> Operation {
    let record = &begun.operation;
    Operation {
        kind: record.kind,
        target: record.target.clone(),
        state: OperationState::Succeeded.into(),
        status_message: format!("would be {}; nothing was changed", record.status_message),
        progress_percent: 100,
        create_time: record.create_time,
        ..Operation::default()
    }
}
