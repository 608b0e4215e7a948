//! `drover-agent`: the daemon on a node. Ending it ends no guest.

use std::fs;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use drover_agent::cli::Options;
use drover_agent::console::Console;
use drover_agent::domain::guest::Guests;
use drover_agent::domain::quiesce::Quiescer;
use drover_agent::domain::{STARTS_AT_ONCE_MAX, Shared};
use drover_agent::error::Error;
use drover_agent::identity::Home;
use drover_agent::records::Places;
use drover_agent::service::Service;
use drover_agent::storage::{self, Images, Volumes};
use drover_agent::{node, process, session, usage};
use drover_proto::agent::v1::Hello;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

fn main() -> ExitCode {
    let options = Options::parse();
    let telemetry = drover_telemetry::init("drover-agent", options.otlp_endpoint.as_deref());
    let _telemetry = match telemetry {
        Ok(guard) => guard,
        Err(error) => {
            eprintln!("drover-agent: {error}");
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start the runtime");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(run(options));
    // What still blocks (a disk that hangs) does not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "drover-agent ends");
            ExitCode::from(error.exit_code())
        }
    }
}

async fn run(options: Options) -> Result<(), Error> {
    options.check()?;
    let addresses = options.addresses()?;
    let home = Home::open(&options.state_dir, &options.node, &options.cluster_id)?;
    let listener = TcpListener::bind(options.listen).await.map_err(|err| Error::Flag {
        flag: "--listen",
        reason: format!("{}: {err}", options.listen),
    })?;
    let boot_id =
        process::boot_id().map_err(|source| Error::Process { action: "read boot_id", source })?;
    let hello = Hello {
        cluster_id: options.cluster_id.clone(),
        node: format!("nodes/{}", options.node),
        node_uid: home.identity.uid.clone(),
        boot_id: boot_id.clone(),
        address: addresses.advertise,
        capacity: Some(usage::capacity(options.vcpu_overcommit, options.memory_reserved)),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_version: fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned(),
    };
    tracing::info!(
        node = options.node,
        uid = hello.node_uid,
        address = hello.address,
        version = hello.agent_version,
        "drover-agent begins"
    );
    let places = Places { state: options.state_dir.clone(), run: options.run_dir.clone() };
    let changed = watch::Sender::new(0);
    let quiescer = Quiescer::new(places.clone());
    let (pools, pools_task) = storage::start(
        &options.pools,
        &options.node,
        &options.state_dir,
        quiescer.clone(),
        changed.clone(),
    )
    .await?;
    let volumes = Volumes::new(pools.clone(), options.node.clone());
    let images = Images::new(pools.clone(), options.node.clone(), options.state_dir.clone());
    let shared = Arc::new(Shared {
        node: options.node.clone(),
        quiescer,
        places: places.clone(),
        vmm: options.vmm,
        bridge: options.bridge,
        storage: pools,
        migration_listen: addresses.migration_listen,
        boot_id,
        starts: Semaphore::new(STARTS_AT_ONCE_MAX),
        clock: tokio::time::Instant::now(),
        changed,
    });
    let node = node::start(shared, home).await?;
    let service = Service {
        console: Console::new(places.clone(), options.node.clone()),
        guests: Guests::new(places, options.node),
        images,
        volumes,
    };
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(service.server())
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::select! {
        error = session::run(options.controllers, hello, node) => Err(error),
        result = server => {
            if let Err(error) = result {
                tracing::error!(%error, "AgentService failed");
            }
            Err(Error::Ended("AgentService"))
        }
        _ = pools_task => Err(Error::Ended("storage task")),
        () = told_to_end() => {
            tracing::info!("drover-agent ends; the domains go on");
            Ok(())
        }
    }
}

/// How often a silent controller that watches a console is asked whether it is there, and how
/// long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

async fn told_to_end() {
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
