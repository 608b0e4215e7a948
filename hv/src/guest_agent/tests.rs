//! The agent's protocol, against scripted guests that speak through the device's real queues.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::virtio::console::tests::Guest;

const PATIENCE: Duration = Duration::from_secs(10);
const PING: &str = r#"{"execute":"guest-ping"}"#;

/// Runs `calls` on the host's side while the guest's side answers each line by `answer`: with
/// pieces that go out one after the other. The lines come without sentinel.
fn with_agent<T>(
    mut answer: impl FnMut(&str) -> Vec<Vec<u8>> + Send,
    calls: impl AsyncFnOnce(&GuestAgent, &AtomicBool) -> T,
) -> T {
    let mut guest = Guest::new();
    guest.open_port();
    let agent = GuestAgent::new(guest.port());
    let (ended, close) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut heard = Vec::new();
            while !ended.load(Ordering::SeqCst) {
                if close.swap(false, Ordering::SeqCst) {
                    guest.close_port();
                }
                heard.extend(guest.hear());
                while let Some(end) = heard.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = heard.drain(..=end).filter(|byte| *byte != 0xff).collect();
                    for piece in answer(str::from_utf8(&line).unwrap()) {
                        guest.say(&piece);
                    }
                }
                std::thread::yield_now();
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            runtime.block_on(calls(&agent, &close))
        }));
        ended.store(true, Ordering::SeqCst);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// What the stock agent answers to the beginning of a call.
fn sync(line: &str) -> Option<Vec<u8>> {
    #[derive(Deserialize)]
    struct Command {
        execute: String,
        arguments: Option<Arguments>,
    }
    #[derive(Deserialize)]
    struct Arguments {
        id: u64,
    }
    let command: Command = serde_json::from_str(line).unwrap();
    (command.execute == "guest-sync-delimited").then(|| {
        let id = command.arguments.unwrap().id;
        format!("\u{0}{{\"return\": {id}}}\n").replace('\0', "").into_bytes()
    })
}

fn delimited(mut answer: Vec<u8>) -> Vec<u8> {
    answer.insert(0, 0xff);
    answer
}

/// An agent that is in order, and answers each command with this.
fn answering(text: &str) -> impl FnMut(&str) -> Vec<Vec<u8>> + Send {
    let text = text.to_owned();
    move |line| match sync(line) {
        Some(answer) => vec![delimited(answer)],
        None => vec![text.clone().into_bytes()],
    }
}

#[test]
fn a_call_gets_its_result_as_it_was_written() {
    let text = "{\"return\": {\"a\": [1, 2.50, \"\u{e4}\"]}}\n";
    let results = with_agent(answering(text), async |agent, _| {
        [agent.call(PING, PATIENCE).await, agent.call(PING, PATIENCE).await]
    });
    let expected = "{\"a\": [1, 2.50, \"\u{e4}\"]}".to_owned();
    assert_eq!(results, [Ok(expected.clone()), Ok(expected)]);
}

/// Answers come in pieces, large ones in many, with empty lines between.
#[test]
fn large_answers_come_whole() {
    let large = "x".repeat(900_000);
    let text = format!("\r\n\n{{\"return\": \"{large}\"}}\r\n");
    let result = with_agent(
        |line| match sync(line) {
            Some(answer) => delimited(answer).chunks(3).map(<[u8]>::to_vec).collect(),
            None => text.as_bytes().chunks(30_000).map(<[u8]>::to_vec).collect(),
        },
        async |agent, _| agent.call(PING, PATIENCE).await,
    );
    assert_eq!(result, Ok(format!("\"{large}\"")));
}

/// What was said to an earlier call, or in the middle of one, is not taken for an answer.
#[test]
fn what_is_old_is_no_answer() {
    let mut first = true;
    let result = with_agent(
        |line| match sync(line) {
            Some(_) if std::mem::take(&mut first) => Vec::new(),
            Some(answer) => vec![
                b"{\"return\": \"late\"}\n{\"error\": {\"class\": \"GenericError\"}}\n half a"
                    .to_vec(),
                delimited(b"{\"return\": 7}\n".to_vec()),
                delimited(b"no JSON\n".to_vec()),
                delimited(answer),
            ],
            None => vec![b"{\"return\": {}}\n".to_vec()],
        },
        async |agent, _| {
            let timeout = Duration::from_millis(100);
            let silent = agent.call(PING, timeout).await.unwrap_err();
            assert_eq!(silent, AgentError::NoAnswer { waited: timeout });
            assert_eq!(silent.to_string(), "no agent in the guest answered within 100ms");
            agent.call(PING, PATIENCE).await
        },
    );
    assert_eq!(result, Ok("{}".into()));
}

#[test]
fn an_agents_error_is_told_with_its_words() {
    let text = "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no \\u001b[31m way\"}}\n";
    let error = with_agent(answering(text), async |agent, _| agent.call(PING, PATIENCE).await)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "the guest's agent refused: CommandNotFound: no  [31m way");
}

#[test]
fn what_is_no_answer_is_refused() {
    for (text, part) in [
        ("{\"retrun\": 1}\n", "neither \"return\" nor \"error\""),
        ("{\"return\": 1\n", "EOF"),
        ("[1]\n", "invalid"),
        ("\u{fffd}\n", "expected value"),
        (&format!("{{\"return\": {}}}\n", "[".repeat(5000)), "expected value"),
    ] {
        let error = with_agent(answering(text), async |agent, _| agent.call(PING, PATIENCE).await)
            .unwrap_err();
        assert!(matches!(error, AgentError::Malformed { .. }), "{text}: {error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// An agent that never ends its line, and one that never says what it should: neither fills the
/// host, and the next call works.
#[test]
fn an_answer_that_does_not_end_is_cut() {
    let (mut flood, mut chatter) = (true, true);
    with_agent(
        |line| match sync(line) {
            Some(answer) if flood => vec![delimited(answer)],
            Some(_) if std::mem::take(&mut chatter) => vec![vec![b'\n'; 30_000]; 150],
            Some(answer) => vec![delimited(answer)],
            None if std::mem::take(&mut flood) => vec![vec![b' '; 30_000]; 50],
            None => vec![b"{\"return\": 1}\n".to_vec()],
        },
        async |agent, _| {
            let error = agent.call(PING, PATIENCE).await.unwrap_err();
            assert_eq!(error, AgentError::TooLarge { limit: ANSWER_BYTES_MAX });
            let error = agent.call(PING, PATIENCE).await.unwrap_err();
            assert_eq!(error, AgentError::TooLarge { limit: STALE_BYTES_MAX });
            assert_eq!(agent.call(PING, PATIENCE).await, Ok("1".into()));
        },
    );
}

/// A guest without agent is told at once, and one whose agent goes away too.
#[test]
fn a_port_that_is_closed_is_no_wait() {
    with_agent(answering(""), async |agent, close| {
        let call = agent.call(PING, PATIENCE);
        let closing = async { close.store(true, Ordering::SeqCst) };
        assert_eq!(tokio::join!(call, closing).0, Err(AgentError::Closed));
        let again = agent.call(PING, PATIENCE).await.unwrap_err().to_string();
        let text = "the guest's agent does not run: the guest has not opened its port";
        assert_eq!(again, text);
    });
}

/// Two callers have one agent: the second waits for the first.
#[test]
fn calls_go_one_after_the_other() {
    let mut between = false;
    with_agent(
        |line| match sync(line) {
            Some(answer) => {
                assert!(!std::mem::replace(&mut between, true), "a call within a call");
                vec![delimited(answer)]
            }
            None => {
                between = false;
                vec![b"{\"return\": 1}\n".to_vec()]
            }
        },
        async |agent, _| {
            let one = || agent.call(PING, PATIENCE);
            let all = tokio::join!(one(), one(), one());
            assert!(matches!(all, (Ok(_), Ok(_), Ok(_))), "{all:?}");
        },
    );
    with_agent(
        |_| Vec::new(),
        async |agent, _| {
            let _held = agent.turn.lock().await;
            let waited = Duration::from_millis(20);
            assert_eq!(agent.call(PING, waited).await, Err(AgentError::Busy { waited }));
        },
    );
}

#[test]
fn only_commands_are_sent() {
    let refused = |command: &str| check(command).unwrap_err().to_string();
    check("{\"execute\":\"guest-file-read\",\"arguments\":{\"handle\":1}}").unwrap();
    assert!(refused("guest-ping").starts_with("command: expected"));
    assert!(refused("{\"arguments\":{}}").contains("missing field `execute`"));
    assert!(refused("[\"guest-ping\"]").contains("a JSON object"));
    assert!(refused("{\"execute\":\"a\"} {\"execute\":\"b\"}").contains("trailing"));
    let long = format!("{{\"execute\":\"{}\"}}", "x".repeat(COMMAND_BYTES_MAX));
    assert_eq!(refused(&long), "command: 262158 bytes; accepted: at most 262144 bytes");
}
