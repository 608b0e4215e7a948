//! The cluster as a whole, and what happened in it.

use drover_proto::v1::{ClusterStatus, Event};

use super::Page;
use crate::out::{
    human::{enum_name, or_dash},
    table::Table,
};

/// Who leads, who is reachable, and how much there is.
pub(crate) fn cluster(status: &ClusterStatus) -> String {
    let mut page = Page::default();
    page.line("cluster", &status.cluster_id);
    let leader = match status.leader_id {
        0 => "none is known".to_owned(),
        id => format!("member {id}, term {}", status.term),
    };
    page.line("leader", &leader);
    page.line("revision", &status.revision.to_string());
    page.line("nodes", &format!("{} ready, {} lost", status.nodes_ready, status.nodes_lost));
    let domains = format!("{} running of {}", status.domains_running, status.domains_total);
    page.line("domains", &domains);
    page.line("operations", &format!("{} active", status.operations_active));
    let mut table = Table::new(&["MEMBER", "ADDRESS", "ROLE", "REACHABLE", "APPLIED"]);
    for member in &status.members {
        let applied = if member.applied_index == 0 {
            "-".to_owned()
        } else {
            member.applied_index.to_string()
        };
        let answered = if member.id == status.answered_by { " (answered)" } else { "" };
        table.row(vec![
            format!("{}{answered}", member.id),
            member.address.clone(),
            or_dash(&member.role.to_ascii_lowercase()),
            if member.reachable { "yes" } else { "no" }.to_owned(),
            applied,
        ]);
    }
    format!("{}\n{}", page.text, table.render())
}

/// One event, on one line.
pub(crate) fn event(event: &Event) -> String {
    let severity = enum_name(event.severity().as_str_name(), "EVENT_SEVERITY_");
    let time = event.time.map(|t| seconds_only(&t.to_string())).unwrap_or_default();
    let line = format!(
        "{:>8}  {time}  {severity:<7}  {:<24}  {}: {}",
        event.revision,
        event.subject,
        event.reason,
        event.message.replace(['\n', '\r'], " ")
    );
    format!("{}\n", line.trim_end_matches(": "))
}

/// RFC 3339 without its fraction.
fn seconds_only(time: &str) -> String {
    match time.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => time.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let mut it = Event {
            revision: 12,
            time: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 1_000_000 }),
            subject: "domains/web1".to_owned(),
            reason: "DOMAIN_STARTED".to_owned(),
            message: "on host1\nwith care".to_owned(),
            ..Event::default()
        };
        it.set_severity(drover_proto::v1::EventSeverity::Info);
        let line = "      12  2023-11-14T22:13:20Z  info     domains/web1              \
                    DOMAIN_STARTED: on host1 with care\n";
        assert_eq!(event(&it), line);
    }
}
