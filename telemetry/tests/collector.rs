//! Spans reach a real OTLP collector over gRPC, with the service's name, and a call between two
//! gRPC peers is one trace: the server's span is the child of the client's.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{net::SocketAddr, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tracing::Instrument;

const WAIT_MAX: Duration = Duration::from_secs(20);

struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.send(request.into_inner()).await.map_err(|_| Status::unavailable("test is over"))?;
        Ok(Response::new(ExportTraceServiceResponse { partial_success: None }))
    }
}

async fn collector() -> (SocketAddr, mpsc::Receiver<ExportTraceServiceRequest>) {
    let (sender, receiver) = mpsc::channel(64);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = TraceServiceServer::new(Collector(sender));
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    (address, receiver)
}

/// A gRPC server that has the layer under test.
async fn traced_server() -> SocketAddr {
    let (_, health) = tonic_health::server::health_reporter();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder().layer(drover_telemetry::TraceServer).add_service(health);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

fn attribute<'a>(span: &'a Span, key: &str) -> Option<&'a Value> {
    span.attributes.iter().find(|a| a.key == key)?.value.as_ref()?.value.as_ref()
}

/// One test: a process has one subscriber.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_is_one_trace_at_the_collector() {
    let (collector, mut exported) = collector().await;
    let endpoint = format!("http://{collector}");
    let guard = drover_telemetry::init("drover-test", Some(&endpoint)).unwrap();
    assert!(guard.exports_traces());
    let again = drover_telemetry::init("drover-test", None).unwrap_err();
    assert!(matches!(again, drover_telemetry::Error::AlreadyInitialised), "{again}");

    let server = traced_server().await;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{server}")).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut client = HealthClient::with_interceptor(channel, drover_telemetry::TraceClient);
    let ask = |service: &str| HealthCheckRequest { service: service.to_owned() };
    async {
        client.check(ask("")).await.unwrap();
        let status = client.check(ask("nobody")).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::NotFound);
    }
    .instrument(tracing::info_span!("drain", node = "host1"))
    .await;

    // The guard sends what waits; the batch's own schedule (5 s) has no part in it.
    tokio::task::spawn_blocking(move || drop(guard)).await.unwrap();
    let mut spans = Vec::new();
    while spans.len() < 3 {
        let batch = tokio::time::timeout(WAIT_MAX, exported.recv()).await.unwrap().unwrap();
        for resource in batch.resource_spans {
            let attributes = &resource.resource.as_ref().unwrap().attributes;
            let name = attributes.iter().find(|a| a.key == "service.name").unwrap();
            let name = name.value.clone().unwrap().value.unwrap();
            assert_eq!(name, Value::StringValue("drover-test".to_owned()));
            spans.extend(resource.scope_spans.into_iter().flat_map(|s| s.spans));
        }
    }

    let drain = spans.iter().find(|s| s.name == "drain").unwrap();
    assert_eq!(attribute(drain, "node"), Some(&Value::StringValue("host1".to_owned())));
    let calls: Vec<_> = spans.iter().filter(|s| s.name == "grpc.health.v1.Health/Check").collect();
    assert_eq!(spans.len(), 3, "nothing else is traced: {spans:?}");
    assert_eq!(calls.len(), 2);
    let mut codes = Vec::new();
    for call in calls {
        assert_eq!(call.trace_id, drain.trace_id);
        assert_eq!(call.parent_span_id, drain.span_id);
        codes.push(attribute(call, "rpc.grpc.status_code").cloned().unwrap());
    }
    codes.sort_by_key(|c| matches!(c, Value::IntValue(v) if *v != 0));
    assert_eq!(codes, [Value::IntValue(0), Value::IntValue(5)]);
}
