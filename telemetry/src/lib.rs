//! Logs and traces of Drover's processes.
//!
//! A process calls [`init`] once, first thing in `main`, and keeps the [`Guard`] until its end:
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let _telemetry = drover_telemetry::init("drover-controller", None)?;
//! tracing::info!(listen = "127.0.0.1:7400", "ready");
//! # Ok(()) }
//! ```
//!
//! From there on `tracing` has two readers. Log lines go to stderr: `DROVER_LOG` filters them
//! (`info` by default, e.g. `info,drover_controller=debug`), `DROVER_LOG_FORMAT` is `compact`
//! (the default) or `json`. Spans go to an OTLP collector over gRPC when an endpoint is given or
//! `OTEL_EXPORTER_OTLP_ENDPOINT` is set; without one nothing of OpenTelemetry runs.
//!
//! A trace crosses processes in the W3C `traceparent` header: [`TraceClient`] writes the current
//! span into a call's metadata, [`TraceServer`] opens a span for each call received, as a child
//! of the caller's.
//!
//! Start reading at [`init`]; `otlp` has the exporter, `propagation` the header.

mod otlp;
mod propagation;

use std::io::IsTerminal;

use tracing_subscriber::{
    EnvFilter, Layer, layer::SubscriberExt, registry::LookupSpan, util::SubscriberInitExt,
};

pub use propagation::{TraceClient, TraceServer, TraceService, inject};

/// Filters the log lines, in the syntax of `tracing_subscriber::EnvFilter`.
pub const ENV_LOG: &str = "DROVER_LOG";
/// `compact` or `json`.
pub const ENV_LOG_FORMAT: &str = "DROVER_LOG_FORMAT";
/// OpenTelemetry's own name for the collector's address.
pub const ENV_OTLP_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

const LOG_FILTER_DEFAULT: &str = "info";

/// Why telemetry could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log filter does not parse.
    #[error("DROVER_LOG: \"{value}\" is no filter ({reason}); use for example \"info,h2=warn\"")]
    Filter {
        /// What the variable holds.
        value: String,
        /// The parser's words.
        reason: String,
    },
    /// The log format is unknown.
    #[error("DROVER_LOG_FORMAT: \"{value}\" is not known; use \"compact\" or \"json\"")]
    Format {
        /// What the variable holds.
        value: String,
    },
    /// The endpoint is no `http://host:port`.
    #[error("otlp-endpoint: \"{value}\" is not accepted ({reason}); use http://HOST:PORT")]
    Endpoint {
        /// What was given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The exporter could not be built.
    #[error("otlp-endpoint: \"{value}\": {reason}")]
    Exporter {
        /// The endpoint.
        value: String,
        /// The exporter's words.
        reason: String,
    },
    /// The thread that exports could not be started.
    #[error("cannot start the trace exporter: {0}")]
    Thread(#[from] std::io::Error),
    /// Something else has set the process's subscriber before.
    #[error("telemetry is already initialised in this process")]
    AlreadyInitialised,
}

/// Ends telemetry when dropped: spans that wait are sent, for at most 3 s.
#[must_use = "dropping the guard ends the export of traces"]
#[derive(Debug)]
pub struct Guard {
    exporter: Option<otlp::Exporter>,
}

impl Guard {
    /// Whether spans are exported.
    pub fn exports_traces(&self) -> bool {
        self.exporter.is_some()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(exporter) = self.exporter.take() {
            exporter.shutdown();
        }
    }
}

/// Starts logs, and traces when there is an endpoint: `otlp_endpoint` first, then
/// `OTEL_EXPORTER_OTLP_ENDPOINT`; an empty one counts as none. `service` becomes `service.name`.
///
/// Works inside and outside a tokio runtime, of any flavour. An endpoint that does not answer is
/// no error: spans are dropped, and the log says so.
///
/// # Errors
/// A filter, format or endpoint that does not parse, or a second call in one process.
pub fn init(service: &'static str, otlp_endpoint: Option<&str>) -> Result<Guard, Error> {
    let filter = log_filter()?;
    let json = log_json()?;
    let exporter = match endpoint(otlp_endpoint) {
        Some(endpoint) => Some(otlp::Exporter::start(service, &endpoint)?),
        None => None,
    };
    let traces = exporter.as_ref().map(|e| e.layer());
    tracing_subscriber::registry()
        .with(log_layer(json).with_filter(filter))
        .with(traces)
        .try_init()
        .map_err(|_| Error::AlreadyInitialised)?;
    if exporter.is_some() {
        propagation::install();
    }
    Ok(Guard { exporter })
}

fn endpoint(given: Option<&str>) -> Option<String> {
    let from_env = || std::env::var(ENV_OTLP_ENDPOINT).ok();
    given.map(str::to_owned).filter(|e| !e.is_empty()).or_else(from_env).filter(|e| !e.is_empty())
}

fn log_filter() -> Result<EnvFilter, Error> {
    let value = std::env::var(ENV_LOG).unwrap_or_default();
    let directives = if value.trim().is_empty() { LOG_FILTER_DEFAULT } else { value.trim() };
    EnvFilter::builder()
        .parse(directives)
        .map_err(|e| Error::Filter { value: value.clone(), reason: e.to_string() })
}

fn log_json() -> Result<bool, Error> {
    match std::env::var(ENV_LOG_FORMAT).unwrap_or_default().as_str() {
        "" | "compact" => Ok(false),
        "json" => Ok(true),
        other => Err(Error::Format { value: other.to_owned() }),
    }
}

fn log_layer<S>(json: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if json { lines.json().flatten_event(true).boxed() } else { lines.compact().boxed() }
}
