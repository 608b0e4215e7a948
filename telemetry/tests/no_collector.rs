//! A collector that does not answer, and a process that ends inside a single-threaded runtime:
//! the guard gives up at its deadline.

use std::time::{Duration, Instant};

#[tokio::test]
async fn the_end_does_not_hang() {
    // Accepts connections and never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let guard = drover_telemetry::init("drover-test", Some(&endpoint)).unwrap();
    tracing::info_span!("work").in_scope(|| tracing::info!("done"));
    let start = Instant::now();
    drop(guard);
    assert!(start.elapsed() < Duration::from_secs(8), "took {:?}", start.elapsed());
}
