//! Nodes.

use std::time::SystemTime;

use drover_proto::v1::{DrainState, Node, NodeCapacity, NodeState};

use super::{Page, cores, with_reason};
use crate::out::{
    human::{age, enum_name, or_dash, short, size},
    table::Table,
};

/// The nodes with their state and room.
pub(crate) fn nodes(nodes: &[Node], now: SystemTime) -> String {
    let mut table =
        Table::new(&["NAME", "STATE", "DOMAINS", "VCPUS", "MEMORY", "CPU", "ADDRESS", "AGE"]);
    for node in nodes {
        let (reserved, capacity) = room(node);
        table.row(vec![
            short(&node.name).to_owned(),
            node_state(node),
            node.domain_count.to_string(),
            format!("{} / {}", reserved.vcpus, capacity.vcpus),
            format!("{} / {}", size(reserved.memory_bytes), size(capacity.memory_bytes)),
            node.usage.as_ref().map_or_else(|| "-".to_owned(), |u| cores(u.cpu_millicores)),
            or_dash(&node.address),
            age(node.register_time.as_ref(), now),
        ]);
    }
    table.render()
}

fn room(node: &Node) -> (NodeCapacity, NodeCapacity) {
    (node.reserved.unwrap_or_default(), node.capacity.unwrap_or_default())
}

/// `ready`, `lost`, and what else holds: `ready, draining`.
fn node_state(node: &Node) -> String {
    let mut states = vec![enum_name(node.state().as_str_name(), "NODE_STATE_")];
    match node.drain_state() {
        DrainState::Unspecified if node.cordoned => states.push("cordoned".to_owned()),
        DrainState::Unspecified => {}
        DrainState::Incomplete => states.push("drain incomplete".to_owned()),
        drain => states.push(enum_name(drain.as_str_name(), "DRAIN_STATE_")),
    }
    states.join(", ")
}

/// One node.
pub(crate) fn node(node: &Node, now: SystemTime) -> String {
    let (reserved, capacity) = room(node);
    let mut page = Page::default();
    page.line("node", short(&node.name));
    page.line("state", &with_reason(&node_state(node), &node.state_reason));
    if node.state() == NodeState::Lost {
        page.line("lost since", &format!("{} ago", age(node.state_time.as_ref(), now)));
    }
    page.line("domains", &node.domain_count.to_string());
    page.line("vcpus", &format!("{} promised of {}", reserved.vcpus, capacity.vcpus));
    page.line(
        "memory",
        &format!("{} promised of {}", size(reserved.memory_bytes), size(capacity.memory_bytes)),
    );
    if let Some(usage) = &node.usage {
        let memory = size(usage.memory_used_bytes);
        page.line("measured", &format!("{}, {memory}", cores(usage.cpu_millicores)));
    }
    page.line("address", &node.address);
    page.line("agent", &node.agent_version);
    page.line("kernel", &node.kernel_version);
    page.line("registered", &format!("{} ago", age(node.register_time.as_ref(), now)));
    page.line("uid", &node.uid);
    page.text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_says_all_that_holds() {
        let mut it = Node { name: "nodes/host1".to_owned(), cordoned: true, ..Node::default() };
        it.set_state(NodeState::Ready);
        assert_eq!(node_state(&it), "ready, cordoned");
        it.set_drain_state(DrainState::Draining);
        assert_eq!(node_state(&it), "ready, draining");
    }
}
