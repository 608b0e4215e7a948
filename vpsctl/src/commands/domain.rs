//! `vpsctl domain`.

use std::time::SystemTime;

use drover_proto::v1::{
    Boot, CreateDomainRequest, DeleteDomainRequest, Domain, DomainSpec, DrainPolicy,
    GetDomainRequest, ListDomainsRequest, MigrateDomainRequest, Operation, OperationState,
    RestartPolicy, StartDomainRequest, StopDomainRequest,
    domain_service_client::DomainServiceClient,
};

use super::{Context, all_pages, call, console, operation::ended, request_id};
use crate::{
    args::{CreateArgs, Detach, DomainCommand, OnDrain, Restart, proto_duration},
    error::Error,
    out::{
        human::{enum_name, short, short_or_dash},
        json, pages, print,
    },
    wait,
};

pub(super) async fn run(context: &Context, command: DomainCommand) -> Result<(), Error> {
    match command {
        DomainCommand::Create(args) => create(context, *args).await,
        DomainCommand::List { node } => {
            let request =
                ListDomainsRequest { node: node.unwrap_or_default(), ..Default::default() };
            let domains = all_pages!(context, DomainServiceClient::list_domains, request, domains);
            let page = || pages::domains(&domains, SystemTime::now());
            context.answer(|| json::array(&domains), page)
        }
        DomainCommand::Show(name) => {
            let domain = get(context, &name.domain).await?;
            context.answer(|| json::object(&domain), || pages::domain(&domain, SystemTime::now()))
        }
        DomainCommand::Start { name, detach } => {
            let request = StartDomainRequest { name: name.domain, request_id: request_id() };
            let operation = call!(context, DomainServiceClient::start_domain, request)?;
            follow(context, operation, &detach).await
        }
        DomainCommand::Stop(args) => {
            let request = StopDomainRequest {
                name: args.name.domain,
                request_id: request_id(),
                force: args.force,
                grace_period: args.grace.map(proto_duration),
            };
            let operation = call!(context, DomainServiceClient::stop_domain, request)?;
            follow(context, operation, &args.detach).await
        }
        DomainCommand::Delete { name, force, detach } => {
            let request = DeleteDomainRequest {
                name: name.domain,
                etag: String::new(),
                request_id: request_id(),
                force,
            };
            let operation = call!(context, DomainServiceClient::delete_domain, request)?;
            follow(context, operation, &detach).await
        }
        DomainCommand::Migrate(args) => {
            let request = MigrateDomainRequest {
                name: args.name.domain,
                request_id: request_id(),
                to_node: args.to.unwrap_or_default(),
                limits: args.limits.message(),
            };
            let operation = call!(context, DomainServiceClient::migrate_domain, request)?;
            follow(context, operation, &args.detach).await
        }
        DomainCommand::Console(args) => console::run(context, args).await,
    }
}

pub(super) async fn get(context: &Context, name: &str) -> Result<Domain, Error> {
    let request = GetDomainRequest { name: name.to_owned() };
    call!(context, DomainServiceClient::get_domain, request)
}

async fn follow(context: &Context, operation: Operation, detach: &Detach) -> Result<(), Error> {
    let done = wait::accepted(&context.cluster, operation, detach, context.json).await?;
    done.map_or(Ok(()), |operation| ended(context, operation))
}

async fn create(context: &Context, args: CreateArgs) -> Result<(), Error> {
    let dry_run = args.dry_run;
    let detach = Detach { detach: args.detach.detach };
    let request = create_request(args);
    let operation = call!(context, DomainServiceClient::create_domain, request)?;
    if dry_run {
        return tried(context, operation);
    }
    let done = wait::accepted(&context.cluster, operation, &detach, context.json).await?;
    let Some(operation) = done else { return Ok(()) };
    if context.json || operation.state() != OperationState::Succeeded {
        return ended(context, operation);
    }
    let domain = get(context, &operation.target).await?;
    let state = enum_name(domain.state().as_str_name(), "DOMAIN_STATE_");
    let node = short_or_dash(&domain.node);
    print(&format!("{} is {state} on {node}\n", short(&domain.name)))
}

/// A dry run's operation is not saved: it says where the domain would go, or why nowhere.
fn tried(context: &Context, operation: Operation) -> Result<(), Error> {
    let page = || match operation.status_message.as_str() {
        "" => format!("{} can be created\n", short(&operation.target)),
        message => format!("{}: {message}\n", short(&operation.target)),
    };
    context.answer(|| json::object(&operation), page)?;
    wait::succeeded(operation).map(|_| ())
}

fn create_request(args: CreateArgs) -> CreateDomainRequest {
    let mut spec = DomainSpec {
        vcpus: args.vcpus,
        memory_bytes: args.memory,
        boot: Some(Boot {
            kernel: args.kernel,
            initramfs: args.initramfs,
            command_line: args.command_line,
        }),
        interfaces: args.net,
        labels: args.label.into_iter().collect(),
        ..DomainSpec::default()
    };
    spec.set_on_reboot(restart_policy(args.on_reboot));
    spec.set_on_crash(restart_policy(args.on_crash));
    spec.set_drain_policy(match args.drain_policy {
        None => DrainPolicy::Unspecified,
        Some(OnDrain::Migrate) => DrainPolicy::Migrate,
        Some(OnDrain::Stay) => DrainPolicy::Stay,
    });
    CreateDomainRequest {
        domain: Some(Domain { name: args.name.domain, spec: Some(spec), ..Domain::default() }),
        request_id: request_id(),
        validate_only: args.dry_run,
        leave_stopped: args.stopped,
        node: args.node.unwrap_or_default(),
    }
}

fn restart_policy(policy: Option<Restart>) -> RestartPolicy {
    match policy {
        None => RestartPolicy::Unspecified,
        Some(Restart::Restart) => RestartPolicy::Restart,
        Some(Restart::Stop) => RestartPolicy::Stop,
    }
}
