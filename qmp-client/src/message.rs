//! What one JSON object from QEMU or from the guest agent says. Unknown members are ignored.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use crate::qmp::{Event, Greeting, Version};

/// One object of the stream.
#[derive(Debug)]
pub(crate) enum Message {
    Greeting(Greeting),
    Event(Event),
    Reply(Reply),
    /// Nothing this protocol knows: later versions may say more than we understand.
    Unknown,
}

/// An answer to a command; `id` as we gave it.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) id: Option<u64>,
    pub(crate) outcome: Result<Value, Refusal>,
}

/// The peer's "no".
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) class: String,
    pub(crate) description: String,
}

/// Reads one object; the shapes are those of QEMU's `docs/interop/qmp-spec`.
pub(crate) fn parse(bytes: &[u8]) -> Result<Message, serde_json::Error> {
    let mut object: Map<String, Value> = serde_json::from_slice(bytes)?;
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(error) = object.remove("error") {
        return Ok(Message::Reply(Reply { id, outcome: Err(refusal(&error)) }));
    }
    if let Some(value) = object.remove("return") {
        return Ok(Message::Reply(Reply { id, outcome: Ok(value) }));
    }
    if let Some(Value::String(name)) = object.remove("event") {
        let timestamp = object.get("timestamp").and_then(timestamp);
        let data = object.remove("data").unwrap_or(Value::Null);
        return Ok(Message::Event(Event { name, data, timestamp }));
    }
    Ok(object.get("QMP").map_or(Message::Unknown, |qmp| Message::Greeting(greeting(qmp))))
}

fn text(value: Option<&Value>) -> String {
    value.and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn refusal(error: &Value) -> Refusal {
    Refusal { class: text(error.get("class")), description: text(error.get("desc")) }
}

/// `None` where QEMU had no clock: it says -1 then.
fn timestamp(value: &Value) -> Option<SystemTime> {
    let seconds = value.get("seconds").and_then(Value::as_u64)?;
    let micros = value.get("microseconds").and_then(Value::as_u64)?;
    let since = Duration::from_secs(seconds).checked_add(Duration::from_micros(micros))?;
    SystemTime::UNIX_EPOCH.checked_add(since)
}

fn greeting(qmp: &Value) -> Greeting {
    let number = |name: &str| {
        let number = qmp.pointer(&format!("/version/qemu/{name}")).and_then(Value::as_u64);
        number.and_then(|n| u32::try_from(n).ok()).unwrap_or_default()
    };
    let version = Version {
        major: number("major"),
        minor: number("minor"),
        micro: number("micro"),
        package: text(qmp.pointer("/version/package")),
    };
    let offered = qmp.get("capabilities").and_then(Value::as_array);
    let capabilities =
        offered.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    Greeting { version, capabilities }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_may_say_more_or_less_than_we_know() {
        let full = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7},
            "package": "Debian 1:7.2", "new": {}}, "capabilities": ["oob", "later", 3]}, "x": 1}"#;
        let Message::Greeting(greeting) = parse(full).unwrap() else { panic!() };
        assert_eq!(greeting.version.to_string(), "7.2.22");
        assert_eq!(greeting.version.package, "Debian 1:7.2");
        assert_eq!(greeting.capabilities, ["oob", "later"]);
        let Message::Greeting(bare) = parse(br#"{"QMP": null}"#).unwrap() else { panic!() };
        assert_eq!(bare.version.major, 0);
        assert!(bare.capabilities.is_empty());
    }

    #[test]
    fn a_null_return_is_a_reply() {
        let Message::Reply(reply) = parse(br#"{"return": null, "id": 3}"#).unwrap() else {
            panic!()
        };
        assert_eq!((reply.id, reply.outcome.unwrap()), (Some(3), Value::Null));
    }

    #[test]
    fn an_event_without_a_clock_or_with_an_absurd_one_survives() {
        for stamp in ["-1", "18446744073709551615", "\"x\"", "1e300"] {
            let line = format!(
                r#"{{"event": "E", "timestamp": {{"seconds": {stamp}, "microseconds": {stamp}}}}}"#
            );
            let Message::Event(event) = parse(line.as_bytes()).unwrap() else { panic!() };
            assert_eq!((event.name.as_str(), event.timestamp), ("E", None), "{stamp}");
        }
    }

    #[test]
    fn a_refusal_without_reasons_is_still_one() {
        let Message::Reply(reply) = parse(br#"{"error": 7}"#).unwrap() else { panic!() };
        assert_eq!(reply.outcome.unwrap_err().class, "");
    }
}
