//! `vpsctl domain`.

use std::time::SystemTime;

use drover_proto::v1::{
    Boot, CloudInit, CreateDomainRequest, DeleteDomainRequest, Domain, DomainSpec, DrainPolicy,
    GetDomainRequest, ListDomainsRequest, MigrateDomainRequest, Operation, OperationState,
    RestartPolicy, StartDomainRequest, StopDomainRequest,
    domain_service_client::DomainServiceClient,
};

use super::{Context, all_pages, call, console, files, lifecycle, operation::ended, request_id};
use crate::{
    args::{CreateArgs, Detach, DomainCommand, OnDrain, Restart, SeedArgs, proto_duration},
    error::Error,
    out::{
        human::{enum_name, short, short_or_dash},
        json, pages, print,
    },
    wait,
};

/// As `--help` has it.
const COMMAND_LINE_DEFAULT: &str = "console=ttyS0";

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
        DomainCommand::Start { name, discard_saved, detach } => {
            let request =
                StartDomainRequest { name: name.domain, request_id: request_id(), discard_saved };
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
        DomainCommand::Resize(args) => lifecycle::resize(context, args).await,
        DomainCommand::Reinstall(args) => lifecycle::reinstall(context, args).await,
        DomainCommand::Rescue(args) => lifecycle::rescue(context, args).await,
        DomainCommand::Save { name, detach } => {
            lifecycle::save(context, name.domain, &detach).await
        }
        DomainCommand::Restore { name, detach } => {
            lifecycle::restore(context, name.domain, &detach).await
        }
        DomainCommand::Guest(name) => lifecycle::guest(context, name.domain).await,
        DomainCommand::SetPassword { name, user } => {
            lifecycle::set_password(context, name.domain, user).await
        }
        DomainCommand::Console(args) => console::run(context, args).await,
    }
}

pub(super) async fn get(context: &Context, name: &str) -> Result<Domain, Error> {
    let request = GetDomainRequest { name: name.to_owned() };
    call!(context, DomainServiceClient::get_domain, request)
}

pub(super) async fn follow(
    context: &Context,
    operation: Operation,
    detach: &Detach,
) -> Result<(), Error> {
    let done = wait::accepted(&context.cluster, operation, detach, context.json).await?;
    done.map_or(Ok(()), |operation| ended(context, operation))
}

async fn create(context: &Context, args: CreateArgs) -> Result<(), Error> {
    let dry_run = args.dry_run;
    let detach = Detach { detach: args.detach.detach };
    let request = create_request(args)?;
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

fn create_request(args: CreateArgs) -> Result<CreateDomainRequest, Error> {
    let mut spec = DomainSpec {
        vcpus: args.vcpus,
        memory_bytes: args.memory,
        boot: Some(boot(&args)?),
        disks: args.disk,
        interfaces: args.interfaces.0,
        cloud_init: seed(args.seed)?,
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
    Ok(CreateDomainRequest {
        domain: Some(Domain { name: args.name.domain, spec: Some(spec), ..Domain::default() }),
        request_id: request_id(),
        validate_only: args.dry_run,
        leave_stopped: args.stopped,
        node: args.node.unwrap_or_default(),
    })
}

/// Without a kernel the first disk boots: it must hold something.
fn boot(args: &CreateArgs) -> Result<Boot, Error> {
    let blank = args.disk.first().is_some_and(|disk| disk.image.is_empty());
    if args.kernel.is_none() && blank {
        return Err(Error::Usage(
            "--disk: the first one is blank, so there is nothing to boot: give it an image=, or \
             give --kernel"
                .to_owned(),
        ));
    }
    // A disk knows its own console; a bare kernel is told the only one there is.
    let command_line = if args.kernel.is_some() { COMMAND_LINE_DEFAULT } else { "" };
    Ok(Boot {
        kernel: args.kernel.clone().unwrap_or_default(),
        initramfs: args.initramfs.clone().unwrap_or_default(),
        command_line: args.command_line.clone().unwrap_or_else(|| command_line.to_owned()),
    })
}

/// The seed, when anything asks for it.
fn seed(args: SeedArgs) -> Result<Option<CloudInit>, Error> {
    let anything = args.host_name.is_some() || args.user_data.is_some();
    if !args.cloud_init && !anything && args.ssh_key.is_empty() {
        return Ok(None);
    }
    let user_data = args.user_data.map(|path| files::user_data(&path)).transpose()?;
    Ok(Some(CloudInit {
        host_name: args.host_name.unwrap_or_default(),
        ssh_authorized_keys: files::public_keys(&args.ssh_key)?,
        user_data: user_data.unwrap_or_default(),
    }))
}

fn restart_policy(policy: Option<Restart>) -> RestartPolicy {
    match policy {
        None => RestartPolicy::Unspecified,
        Some(Restart::Restart) => RestartPolicy::Restart,
        Some(Restart::Stop) => RestartPolicy::Stop,
    }
}
