//! JSON for programs, made from the API's own descriptors, so that a field added there is here.
//!
//! Fields are named as in the proto, all of them always there. Enums are their short lower-case
//! names (`DOMAIN_STATE_RUNNING` is `"running"`), times RFC 3339, durations seconds, sizes bytes;
//! bytes are an array of numbers. What is unset, an enum or a message, is `null`.

use std::sync::LazyLock;

use drover_proto::v1;
use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey,
    MessageDescriptor, ReflectMessage, Value as Field,
};
use serde_json::{Map, Value};

use crate::error::Error;

/// A message that is printed, and its name in the proto.
pub(crate) trait View: Message {
    const NAME: &'static str;
}

macro_rules! view {
    ($($message:ident),*) => {
        $(impl View for v1::$message {
            const NAME: &'static str = concat!("drover.v1.", stringify!($message));
        })*
    };
}
view!(
    BalancePlan,
    ClusterStatus,
    Domain,
    DrainPlan,
    Event,
    Guest,
    Image,
    Network,
    Node,
    Operation,
    Pool,
    Snapshot,
    Volume
);

static POOL: LazyLock<Result<DescriptorPool, String>> = LazyLock::new(|| {
    DescriptorPool::decode(drover_proto::FILE_DESCRIPTOR_SET).map_err(|e| e.to_string())
});

/// One object, indented, with a newline.
pub(crate) fn object<M: View>(message: &M) -> Result<String, Error> {
    Ok(format!("{:#}\n", view(message)?))
}

/// One array, indented, with a newline.
pub(crate) fn array<M: View>(messages: &[M]) -> Result<String, Error> {
    let values: Result<Vec<_>, _> = messages.iter().map(view).collect();
    Ok(format!("{:#}\n", Value::Array(values?)))
}

/// Values that are no messages of the API, as one array.
pub(crate) fn values(values: Vec<Value>) -> String {
    format!("{:#}\n", Value::Array(values))
}

/// One object on one line, with a newline.
pub(crate) fn line<M: View>(message: &M) -> Result<String, Error> {
    Ok(format!("{}\n", view(message)?))
}

fn view<M: View>(message: &M) -> Result<Value, Error> {
    let broken = |e: String| Error::Local(format!("{} as JSON: {e}", M::NAME));
    let pool = POOL.as_ref().map_err(|e| broken(e.clone()))?;
    let descriptor =
        pool.get_message_by_name(M::NAME).ok_or_else(|| broken("not described".to_owned()))?;
    let message = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .map_err(|e| broken(e.to_string()))?;
    Ok(message_value(&message))
}

fn message_value(message: &DynamicMessage) -> Value {
    let descriptor: MessageDescriptor = message.descriptor();
    match descriptor.full_name() {
        "google.protobuf.Timestamp" => {
            well_known(message, |t: prost_types::Timestamp| Value::String(t.to_string()))
        }
        "google.protobuf.Duration" => well_known(message, |d: prost_types::Duration| {
            (d.seconds as f64 + f64::from(d.nanos) / 1e9).into()
        }),
        _ => {
            let value = |f: FieldDescriptor| (f.name().to_owned(), field_value(message, &f));
            Value::Object(descriptor.fields().map(value).collect())
        }
    }
}

fn well_known<T: Message + Default>(message: &DynamicMessage, show: fn(T) -> Value) -> Value {
    message.transcode_to().map_or(Value::Null, show)
}

fn field_value(message: &DynamicMessage, field: &FieldDescriptor) -> Value {
    if field.supports_presence() && !message.has_field(field) {
        return Value::Null;
    }
    one_value(&message.get_field(field), &field.kind())
}

fn one_value(value: &Field, kind: &Kind) -> Value {
    match (value, kind) {
        (Field::EnumNumber(number), Kind::Enum(descriptor)) => enum_value(descriptor, *number),
        (Field::List(items), kind) => items.iter().map(|item| one_value(item, kind)).collect(),
        (Field::Map(entries), Kind::Message(entry)) => {
            let kind = entry.map_entry_value_field().kind();
            let mut object: Vec<_> =
                entries.iter().map(|(k, v)| (map_key(k), one_value(v, &kind))).collect();
            object.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(Map::from_iter(object))
        }
        (Field::Message(message), _) => message_value(message),
        (Field::Bool(v), _) => (*v).into(),
        (Field::I32(v), _) => (*v).into(),
        (Field::I64(v), _) => (*v).into(),
        (Field::U32(v), _) => (*v).into(),
        (Field::U64(v), _) => (*v).into(),
        (Field::F32(v), _) => (*v).into(),
        (Field::F64(v), _) => (*v).into(),
        (Field::String(v), _) => v.as_str().into(),
        (Field::Bytes(v), _) => v.as_ref().into(),
        // An enum or a map whose kind says otherwise: the descriptors are our own.
        (Field::EnumNumber(number), _) => (*number).into(),
        (Field::Map(_), _) => Value::Null,
    }
}

/// The value's name without the enum's prefix; `null` for unspecified, the number when unknown.
fn enum_value(descriptor: &EnumDescriptor, number: i32) -> Value {
    let unspecified = descriptor.get_value(0).map(|v| v.name().to_owned()).unwrap_or_default();
    let prefix = unspecified.strip_suffix("UNSPECIFIED").unwrap_or_default();
    match descriptor.get_value(number) {
        _ if number == 0 => Value::Null,
        Some(value) => {
            let name = value.name();
            name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase().into()
        }
        None => number.into(),
    }
}

fn map_key(key: &MapKey) -> String {
    match key {
        MapKey::Bool(v) => v.to_string(),
        MapKey::I32(v) => v.to_string(),
        MapKey::I64(v) => v.to_string(),
        MapKey::U32(v) => v.to_string(),
        MapKey::U64(v) => v.to_string(),
        MapKey::String(v) => v.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The promise of the module's head, on one message that has every kind of field.
    #[test]
    fn a_domain_as_programs_see_it() {
        let mut domain = v1::Domain {
            name: "domains/web1".to_owned(),
            epoch: u64::MAX,
            create_time: Some(prost_types::Timestamp {
                seconds: 1_700_000_000,
                nanos: 500_000_000,
            }),
            usage: Some(v1::DomainUsage {
                uptime: Some(prost_types::Duration { seconds: 3, nanos: 250_000_000 }),
                ..v1::DomainUsage::default()
            }),
            placement: Some(v1::Placement {
                rejected: vec![v1::NodeRejection { node: "nodes/a".into(), reason: "full".into() }],
                ..v1::Placement::default()
            }),
            spec: Some(v1::DomainSpec {
                memory_bytes: 256 << 20,
                labels: [("tier".to_owned(), "gold".to_owned())].into(),
                ..v1::DomainSpec::default()
            }),
            ..v1::Domain::default()
        };
        domain.set_state(v1::DomainState::Running);
        let value = view(&domain).unwrap();
        assert_eq!(value["name"], "domains/web1");
        assert_eq!(value["state"], "running");
        assert_eq!(value["epoch"], json!(u64::MAX));
        assert_eq!(value["last_exit"], Value::Null, "an enum that is unset");
        assert_eq!(value["create_time"], "2023-11-14T22:13:20.500Z");
        assert_eq!(value["usage"]["uptime"], 3.25);
        assert_eq!(value["placement"]["rejected"][0]["reason"], "full");
        assert_eq!(value["placement"]["time"], Value::Null, "a message that is unset");
        assert_eq!(value["spec"]["memory_bytes"], json!(256 << 20));
        assert_eq!(value["spec"]["labels"], json!({"tier": "gold"}));
        assert_eq!(value["spec"]["interfaces"], json!([]));
        assert_eq!(value["addresses"], json!([]));
    }

    #[test]
    fn lists_are_arrays_and_events_lines() {
        assert_eq!(array::<v1::Node>(&[]).unwrap(), "[]\n");
        let mut event = v1::Event { revision: 7, ..v1::Event::default() };
        event.set_severity(v1::EventSeverity::Warning);
        let text = line(&event).unwrap();
        assert_eq!(text.lines().count(), 1);
        let back: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&back["revision"], &back["severity"]), (&json!(7), &json!("warning")));
    }

    /// A state that an older vpsctl does not know is a number, not an error.
    #[test]
    fn an_unknown_enum_value_is_its_number() {
        let node = v1::Node { state: 99, ..v1::Node::default() };
        assert_eq!(view(&node).unwrap()["state"], 99);
    }
}
