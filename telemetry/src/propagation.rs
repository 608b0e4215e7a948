//! The W3C `traceparent` header on gRPC calls, written by clients and read by servers.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use opentelemetry::{
    global,
    propagation::{Extractor, Injector},
    trace::TraceContextExt,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::{
    Request, Status,
    metadata::{MetadataKey, MetadataMap},
    service::Interceptor,
};
use tower::{Layer, Service};
use tracing::{Instrument, Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;

pub(crate) fn install() {
    global::set_text_map_propagator(TraceContextPropagator::new());
}

/// Writes the current span into a call's metadata, so that what the server does becomes part of
/// the caller's trace. Does nothing where traces are not exported.
pub fn inject(metadata: &mut MetadataMap) {
    let context = Span::current().context();
    global::get_text_map_propagator(|p| p.inject_context(&context, &mut Metadata(metadata)));
}

/// A client's interceptor that calls [`inject`] for each call:
/// `NodeServiceClient::with_interceptor(channel, TraceClient)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct TraceClient;

impl Interceptor for TraceClient {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        inject(request.metadata_mut());
        Ok(request)
    }
}

/// A server's layer that runs each call in a span named after its method, a child of the caller's
/// span when the call carries one: `Server::builder().layer(TraceServer)`.
///
/// The span lasts until the response's head: for a stream, until it is open.
#[derive(Clone, Copy, Debug, Default)]
pub struct TraceServer;

impl<S> Layer<S> for TraceServer {
    type Service = TraceService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        TraceService { inner }
    }
}

/// The service that [`TraceServer`] makes.
#[derive(Clone, Debug)]
pub struct TraceService<S> {
    inner: S,
}

impl<S, B, R> Service<http::Request<B>> for TraceService<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let span = call_span(&request);
        let future = span.in_scope(|| self.inner.call(request));
        let recorded = span.clone();
        let answer = async move {
            let answer = future.await;
            if let Ok(response) = &answer {
                record_status(&recorded, response.headers());
            }
            answer
        };
        Box::pin(answer.instrument(span))
    }
}

fn call_span<B>(request: &http::Request<B>) -> Span {
    let method = request.uri().path().trim_start_matches('/');
    let span = tracing::info_span!(
        "rpc",
        otel.name = method,
        otel.kind = "server",
        rpc.system = "grpc",
        rpc.grpc.status_code = Empty
    );
    let parent = global::get_text_map_propagator(|p| p.extract(&Headers(request.headers())));
    if parent.span().span_context().is_valid() {
        // Fails only where no layer exports spans.
        let _ = span.set_parent(parent);
    }
    span
}

/// A call that fails at once has its status in the head; 0 otherwise.
fn record_status(span: &Span, head: &http::HeaderMap) {
    let status = head.get("grpc-status").and_then(|s| s.to_str().ok()?.parse::<i64>().ok());
    span.record("rpc.grpc.status_code", status.unwrap_or(0));
}

struct Metadata<'a>(&'a mut MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (MetadataKey::from_bytes(key.as_bytes()), value.parse()) {
            self.0.insert(key, value);
        }
    }
}

struct Headers<'a>(&'a http::HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
