//! `drover-controller`: one member of the controllers' group.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use drover_controller::api::{self, Service, ServiceOptions};
use drover_controller::config::{Args, Config};
use drover_controller::raft::{self, Claim, Failure, Limits, Running, StartError, StartOptions};
use drover_controller::scheduler::Strategy;
use drover_controller::session::Hub;
use drover_controller::store::Store;
use drover_controller::workflows::{Settings, driver};
use drover_telemetry::TraceServer;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::timeout;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// The flags make no sense; clap's own code for that, too.
const EXIT_USAGE: u8 = 2;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIME: Duration = Duration::from_secs(5);
/// For the calls that are under way when the process is told to end.
const DRAIN_TIME: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let config = match Args::parse().validate() {
        Ok(config) => config,
        Err(error) => return end(&error, EXIT_USAGE),
    };
    let guard = drover_telemetry::init("drover-controller", config.otlp_endpoint.as_deref());
    let _telemetry = match guard {
        Ok(guard) => guard,
        Err(error) => return end(&error, EXIT_USAGE),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(config));
            // Streams that are still open end with the process.
            runtime.shutdown_timeout(Duration::from_secs(1));
            result
        }
        Err(source) => Err(Error::Runtime(source)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => end(&error, 1),
    }
}

fn end(error: &dyn std::error::Error, code: u8) -> ExitCode {
    eprintln!("drover-controller: {error}");
    ExitCode::from(code)
}

/// Why the process ends.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the runtime: {0}")]
    Runtime(std::io::Error),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("--listen {address}: {reason}")]
    Listen { address: std::net::SocketAddr, reason: String },
    #[error("the server: {0}")]
    Serve(#[from] tonic::transport::Error),
    #[error("the reflection service: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error(transparent)]
    Failed(#[from] Failure),
    #[error("the workflows: {0}")]
    Workflows(JoinError),
}

async fn run(config: Config) -> Result<(), Error> {
    let mut signals = Signals::new().map_err(Error::Runtime)?;
    // First the address: whoever cannot have it must not touch the data.
    let incoming = TcpIncoming::bind(config.listen)
        .map_err(|e| Error::Listen { address: config.listen, reason: e.to_string() })?
        .with_nodelay(Some(true));
    let claim = Claim {
        cluster_id: config.cluster_id.clone(),
        member: config.id,
        members: config.members.clone(),
    };
    let options =
        StartOptions { claim, data_dir: config.data_dir.clone(), limits: Limits::default() };
    let mut running = raft::start(options)?;
    tracing::info!(
        member = config.id,
        cluster = config.cluster_id,
        listen = %config.listen,
        storage = running.identity.storage_id,
        "drover-controller is up"
    );

    let (health, health_service) = tonic_health::server::health_reporter();
    // The process lives; "" says whether it can answer. Kubernetes asks both.
    health.set_service_status("live", ServingStatus::Serving).await;
    tokio::spawn(report_health(health.clone(), running.store.clone()));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(drover_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let (routes, mut workflows) = serve(&config, &running);
    let routes = routes
        .add_service(running.server.clone())
        .add_service(health_service)
        .add_service(reflection);
    let (shutdown, shut_down) = oneshot::channel::<()>();
    let mut server = tokio::spawn(
        Server::builder()
            .layer(TraceServer)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIME))
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, async {
                // Dropped or sent, it is the end.
                let _ = shut_down.await;
            }),
    );

    tokio::select! {
        name = signals.next() => tracing::info!(signal = name, "ending"),
        failure = running.failed() => {
            running.abandon().await;
            return Err(failure.into());
        }
        ended = &mut workflows => {
            // They end well when the store closes, for which there is a reason; otherwise this
            // member would lead and do nothing.
            let why = match ended {
                Ok(()) => running.failed().await.into(),
                Err(error) => Error::Workflows(error),
            };
            running.abandon().await;
            return Err(why);
        }
        served = &mut server => {
            return match served {
                Ok(Err(error)) => Err(error.into()),
                // It ends only when it is told to.
                Ok(Ok(())) | Err(_) => Err(Failure::Panicked.into()),
            };
        }
    }
    health.set_service_status("", ServingStatus::NotServing).await;
    running.stop().await?;
    let _ = shutdown.send(());
    if timeout(DRAIN_TIME, server).await.is_err() {
        tracing::debug!("streams are still open");
    }
    Ok(())
}

/// The API and the agents' sessions, and the workflows, which begin to run behind them.
fn serve(config: &Config, running: &Running) -> (Routes, JoinHandle<()>) {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let settings = Settings {
        lease_ms: millis(config.node_lease),
        report_interval_ms: millis(config.report_interval),
    };
    let hub = Hub::new();
    let workflows = tokio::spawn(driver::run(running.store.clone(), hub.clone(), settings));
    let options = ServiceOptions {
        cluster_id: config.cluster_id.clone(),
        member: config.id,
        settings,
        strategy: Strategy::default(),
    };
    (api::routes(&Service::new(running.store.clone(), hub, options)), workflows)
}

/// Serving while a leader is known: only then can anything be answered.
async fn report_health(health: HealthReporter, store: Store) {
    let mut leadership = store.leadership();
    loop {
        let serving = match leadership.borrow_and_update().leader {
            Some(_) => ServingStatus::Serving,
            None => ServingStatus::NotServing,
        };
        health.set_service_status("", serving).await;
        if leadership.changed().await.is_err() {
            return;
        }
    }
}

/// The signals that end the process.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
