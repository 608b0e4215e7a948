//! Fetching an image's file by URL: http and https, redirects within bounds, and a deadline on
//! silence instead of one on the whole, as nobody knows how long a good download takes.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, LOCATION, USER_AGENT};
use http::uri::Scheme;
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::time::timeout;

const REDIRECTS_MAX: usize = 5;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// From the request to the answer's head, and between two pieces of its body.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const URL_BYTES_MAX: usize = 4096;

/// A file that comes.
#[derive(Debug)]
pub(super) struct Download {
    body: Incoming,
    /// Its size, if the server says it.
    pub(super) bytes: Option<u64>,
}

/// Begins a download. Errors are for people, and begin with the field's name.
pub(super) async fn get(url: &str) -> Result<Download, String> {
    let mut uri = parse(url)?;
    for _ in 0..=REDIRECTS_MAX {
        let wrong = |what: &str| format!("url: {uri}: {what}");
        let response = timeout(SILENCE_MAX, ask(&uri)).await;
        let response = response.map_err(|_| wrong("the server does not answer"))??;
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        if response.status().is_redirection() {
            let to = header(LOCATION).ok_or_else(|| wrong("a redirect to nowhere"))?;
            uri = follow(&uri, to)?;
            continue;
        }
        if response.status() != StatusCode::OK {
            return Err(wrong(&format!("the server answers {}", response.status())));
        }
        if let Some(coding) = header(CONTENT_ENCODING).filter(|coding| *coding != "identity") {
            return Err(wrong(&format!("comes as {coding}; the plain file is accepted")));
        }
        let bytes = header(CONTENT_LENGTH).and_then(|value| value.parse().ok());
        return Ok(Download { body: response.into_body(), bytes });
    }
    Err(format!("url: {url}: more than {REDIRECTS_MAX} redirects"))
}

impl Download {
    /// The next piece; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            let silence = || format!("url: nothing came for {} s", SILENCE_MAX.as_secs());
            let frame = timeout(SILENCE_MAX, self.body.frame()).await.map_err(|_| silence())?;
            match frame {
                None => return Ok(None),
                Some(Err(err)) => return Err(format!("url: the download broke off: {err}")),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

async fn ask(uri: &Uri) -> Result<Response<Incoming>, String> {
    let wrong = |err: &dyn std::error::Error| {
        let mut text = format!("url: {uri}: {err}");
        let mut source = err.source();
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    };
    let request = Request::get(uri)
        .header(USER_AGENT, concat!("drover-agent/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|err| wrong(&err))?;
    let mut tcp = HttpConnector::new();
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let builder = Client::builder(TokioExecutor::new());
    if uri.scheme() == Some(&Scheme::HTTP) {
        return builder.build(tcp).request(request).await.map_err(|err| wrong(&err));
    }
    tcp.enforce_http(false);
    // Named, so that it is this one whatever else is linked into the program.
    let tls = HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
        .map_err(|err| format!("url: {uri}: the node has no certificates to trust: {err}"))?
        .https_only()
        .enable_http1()
        .wrap_connector(tcp);
    builder.build(tls).request(request).await.map_err(|err| wrong(&err))
}

fn parse(url: &str) -> Result<Uri, String> {
    let wrong = || {
        let url: String = url.chars().take(200).collect();
        format!("url: {url:?}: give http://… or https://…")
    };
    if url.len() > URL_BYTES_MAX {
        return Err(wrong());
    }
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let known = uri.scheme() == Some(&Scheme::HTTP) || uri.scheme() == Some(&Scheme::HTTPS);
    // A name and password would end up in logs.
    let plain = uri.authority().is_some_and(|a| !a.as_str().contains('@') && !a.host().is_empty());
    if known && plain { Ok(uri) } else { Err(wrong()) }
}

/// Where a redirect leads: another URL, or a path on the same server.
fn follow(from: &Uri, to: &str) -> Result<Uri, String> {
    let next = if to.starts_with('/') && !to.starts_with("//") {
        let authority = from.authority().map_or("", |authority| authority.as_str());
        parse(&format!("{}://{authority}{to}", from.scheme_str().unwrap_or_default()))?
    } else {
        parse(to)?
    };
    if from.scheme() == Some(&Scheme::HTTPS) && next.scheme() == Some(&Scheme::HTTP) {
        return Err(format!("url: {from}: leads to {next}, from https to http; that is refused"));
    }
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_http_and_https_are_fetched() {
        assert!(parse("http://10.0.0.1:8080/disk.raw").is_ok());
        assert!(parse("https://example.org/debian.qcow2?x=1").is_ok());
        for bad in ["", "disk.raw", "/etc/shadow", "file:///etc/shadow", "ftp://h/f", "http://"] {
            assert!(parse(bad).unwrap_err().contains("http://… or https://…"), "{bad}");
        }
        assert!(parse("http://user:secret@host/x").is_err());
        assert!(parse(&format!("http://h/{}", "x".repeat(URL_BYTES_MAX))).is_err());
    }

    /// A server that speaks no TLS: what is refused is the handshake.
    #[tokio::test]
    async fn https_is_spoken_where_it_is_asked_for() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}/disk", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let first = stream.read_u8().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
            first
        });
        let error = get(&url).await.unwrap_err();
        assert!(error.starts_with(&format!("url: {url}: ")), "{error}");
        if !error.contains("no certificates") {
            const TLS_HANDSHAKE: u8 = 22;
            assert_eq!(server.await.unwrap(), TLS_HANDSHAKE);
        }
    }

    #[test]
    fn redirects_go_on_and_never_down() {
        let from: Uri = "https://a.example/x/y".parse().unwrap();
        assert_eq!(follow(&from, "/z?q").unwrap(), "https://a.example/z?q");
        assert_eq!(follow(&from, "https://b.example/z").unwrap(), "https://b.example/z");
        assert!(follow(&from, "http://a.example/z").unwrap_err().contains("refused"));
        assert!(follow(&from, "file:///etc/shadow").is_err());
        assert!(follow(&from, "//b.example/z").is_err());
    }
}
