//! The OTLP exporter, with a thread and a runtime of its own: it works whatever runtime the
//! process has, also while that one is busy or ending.

use std::time::Duration;

use opentelemetry::{KeyValue, trace::TracerProvider};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{Layer, filter::Targets, registry::LookupSpan};

use crate::Error;

/// One export may take this long.
const EXPORT_TIME_MAX: Duration = Duration::from_secs(2);
/// What waits at the end of the process has this long to leave.
const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(3);
/// What carries spans is not traced: exporting would make more to export.
const UNTRACED: [&str; 5] = ["h2", "hyper", "hyper_util", "tonic", "tower"];

#[derive(Debug)]
pub(crate) struct Exporter {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    runtime: tokio::runtime::Runtime,
}

impl Exporter {
    pub(crate) fn start(service: &'static str, endpoint: &str) -> Result<Self, Error> {
        check(endpoint)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("otlp-export")
            .enable_all()
            .build()?;
        let entered = runtime.enter();
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(EXPORT_TIME_MAX)
            .build()
            .map_err(|e| Error::Exporter { value: endpoint.to_owned(), reason: e.to_string() })?;
        let resource = Resource::builder()
            .with_service_name(service)
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer(service);
        drop(entered);
        Ok(Self { provider, tracer, runtime })
    }

    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let untraced = UNTRACED.map(|target| (target, LevelFilter::OFF));
        let traced = Targets::new().with_default(LevelFilter::INFO).with_targets(untraced);
        tracing_opentelemetry::layer().with_tracer(self.tracer.clone()).with_filter(traced)
    }

    /// Sends what waits, within the deadline; what does not leave in time is lost.
    pub(crate) fn shutdown(self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SHUTDOWN_TIME_MAX) {
            tracing::warn!(%error, "the last traces were not exported");
        }
        // Not dropped: a runtime may not be dropped inside another one.
        self.runtime.shutdown_background();
    }
}

/// An endpoint is `http://host[:port]`, with nothing behind it.
fn check(endpoint: &str) -> Result<(), Error> {
    let refuse = |reason: &str| {
        Err(Error::Endpoint { value: endpoint.to_owned(), reason: reason.to_owned() })
    };
    let uri: http::Uri = match endpoint.parse() {
        Ok(uri) => uri,
        Err(e) => {
            return Err(Error::Endpoint { value: endpoint.to_owned(), reason: format!("{e}") });
        }
    };
    match uri.scheme_str() {
        Some("http") if uri.host().is_none_or(str::is_empty) => refuse("it has no host"),
        Some("http") => Ok(()),
        Some("https") => refuse("TLS to the collector is not supported"),
        Some(_) => refuse("the scheme is not http"),
        None => refuse("it has no scheme"),
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    /// What is accepted, and that a refusal names the field, the value and what would do.
    #[test]
    fn endpoints() {
        assert!(check("http://127.0.0.1:4317").is_ok());
        assert!(check("http://collector.monitoring.svc").is_ok());
        for bad in ["collector:4317", "127.0.0.1", "https://c:4317", "ftp://c", "http://", "a b"] {
            let error = check(bad).unwrap_err().to_string();
            assert!(error.starts_with(&format!("otlp-endpoint: \"{bad}\"")), "{error}");
            assert!(error.ends_with("use http://HOST:PORT"), "{error}");
        }
    }
}
