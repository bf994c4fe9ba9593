//! `resources/control-api.json` and the implementation say the same.

use std::collections::BTreeSet;

use harrier_control::api::{
    AttachRequest, ExecRequest, KillRequest, MachineState, SnapshotRequest, StopRequest,
};
use harrier_control::routes::ROUTES;
use harrier_control::{ApiError, ClientError};
use serde_json::{Map, Value, json};

use crate::support::served;

fn document() -> Value {
    serde_json::from_str(include_str!("../../../../resources/control-api.json")).unwrap()
}

/// What a reference points to.
fn resolve<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str() {
        Some(reference) => resolve(document, document.pointer(&reference[1..]).expect(reference)),
        None => value,
    }
}

/// Whether `value` is what `schema` says, and says no more than it; the words of JSON Schema that the document uses.
fn check(document: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = resolve(document, schema);
    if let Some(options) = schema["oneOf"].as_array() {
        let fits = |option: &&Value| std::panic::catch_unwind(|| check(document, option, value, at)).is_ok();
        assert_eq!(options.iter().filter(fits).count(), 1, "{at}: {value}");
        return;
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::Array(types) => types.iter().map(|name| name.as_str().unwrap()).collect(),
        name => vec![name.as_str().unwrap_or_else(|| panic!("{at}: the schema has no type"))],
    };
    let is = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    assert!(types.contains(&is), "{at}: {value} is not one of {types:?}");
    if let Some(words) = schema["enum"].as_array() {
        assert!(words.contains(value), "{at}: {value}");
    }
    if let (Some(least), Some(number)) = (schema["minimum"].as_u64(), value.as_u64()) {
        assert!(number >= least && number <= schema["maximum"].as_u64().unwrap(), "{at}: {value}");
    }
    if let Some(items) = value.as_array() {
        items.iter().for_each(|item| check(document, &schema["items"], item, at));
    }
    if let Some(members) = value.as_object() {
        let empty = Map::new();
        let properties = schema["properties"].as_object().unwrap_or(&empty);
        for (name, member) in members {
            let property = properties.get(name).unwrap_or_else(|| panic!("{at}: {name} is not described"));
            check(document, property, member, &format!("{at}.{name}"));
        }
        for name in schema["required"].as_array().into_iter().flatten() {
            assert!(members.contains_key(name.as_str().unwrap()), "{at}: {name} is missing");
        }
    }
}

/// Whether what a type can say is all that the schema has: no member is left over.
fn complete(document: &Value, schema: &str, value: &Value) {
    let schema = &document["components"]["schemas"][schema];
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(keys(&schema["properties"]), keys(value));
    check(document, schema, value, "value");
}

#[test]
fn paths_and_methods_are_the_documents() {
    let document = document();
    let mut described = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            described.insert((method.to_uppercase(), path.clone()));
        }
    }
    let implemented = ROUTES.iter().map(|route| (route.method.to_owned(), route.path.to_owned())).collect();
    assert_eq!(described, implemented);
}

#[test]
fn every_answer_is_of_the_documents_shape() {
    let (document, served) = (document(), served());
    for route in ROUTES {
        let request = format!("{} {} HTTP/1.1\r\nHost: x\r\n\r\n", route.method, route.path);
        let (status, body) = served.raw(request.as_bytes());
        let responses = &document["paths"][route.path][route.method.to_lowercase()]["responses"];
        let described = responses.get(status.to_string()).unwrap_or(&responses["default"]);
        let response = resolve(&document, described);
        let schema = &response["content"]["application/json"]["schema"];
        assert!(schema.is_object(), "{}: status {status} is not described", route.path);
        check(&document, schema, &serde_json::from_str(&body).unwrap(), route.path);
        // Another method, and what is under no path.
        let (status, body) = served.raw(format!("BREW {} HTTP/1.1\r\n\r\n", route.path).as_bytes());
        assert_eq!(status, 405);
        check(
            &document,
            &json!({"$ref": "#/components/schemas/Error"}),
            &serde_json::from_str(&body).unwrap(),
            "405",
        );
    }
    assert_eq!(served.raw(b"GET /v1/machines HTTP/1.1\r\n\r\n").0, 404);
}

#[test]
fn every_type_has_the_documents_members() {
    let (document, served) = (document(), served());
    let info = serde_json::to_value(served.client.info().unwrap()).unwrap();
    complete(&document, "MachineInfo", &info);
    complete(&document, "Usage", &info["usage"]);
    complete(&document, "OutputInfo", &info["output"]);
    complete(&document, "StopRequest", &serde_json::to_value(StopRequest::default()).unwrap());
    let exec =
        ExecRequest { workdir: Some("/".to_owned()), tty: Some(Default::default()), ..Default::default() };
    let exec = serde_json::to_value(exec).unwrap();
    complete(&document, "ExecRequest", &exec);
    complete(&document, "TerminalSize", &exec["tty"]);
    complete(&document, "AttachRequest", &serde_json::to_value(AttachRequest::default()).unwrap());
    complete(&document, "CommandEnd", &json!({"exit_code": 3, "error": "x"}));
    complete(&document, "KillRequest", &serde_json::to_value(KillRequest { signal: Some(2) }).unwrap());
    complete(&document, "StateChange", &json!({"state": MachineState::Paused}));
    let request =
        SnapshotRequest { target: "/s".to_owned(), diff: true, resume: false, image: false, compress: false };
    complete(&document, "SnapshotRequest", &serde_json::to_value(&request).unwrap());
    let taken = served.client.snapshot(&request).unwrap();
    assert_eq!((taken.path.as_str(), taken.pages), ("/s", 3));
    complete(&document, "SnapshotInfo", &serde_json::to_value(taken).unwrap());
    let error = harrier_control::http::Response::error(&ApiError::conflict("no"));
    complete(&document, "Error", &serde_json::from_slice(&error.body).unwrap());
    let states = document["components"]["schemas"]["MachineState"]["enum"].as_array().unwrap();
    let known =
        states.iter().map(|word| serde_json::from_value::<MachineState>(word.clone()).unwrap().as_str());
    assert_eq!(
        known.collect::<Vec<_>>(),
        states.iter().map(|word| word.as_str().unwrap()).collect::<Vec<_>>()
    );
}

#[test]
fn the_client_gets_what_the_machine_says() {
    let served = served();
    assert_eq!(served.client.info().unwrap().name.as_str(), "m");
    assert_eq!(served.client.pause().unwrap(), MachineState::Paused);
    assert_eq!(served.client.resume().unwrap(), MachineState::Running);
    assert_eq!(served.client.stop(StopRequest { timeout_ms: 7 }).unwrap(), MachineState::Stopping);
    assert_eq!(served.client.kill(KillRequest { signal: Some(2) }).unwrap(), MachineState::Stopping);
    assert_eq!(
        *served.machine.asked.lock().unwrap(),
        ["StopRequest { timeout_ms: 7 }", "KillRequest { signal: Some(2) }"]
    );
    let refused = served.client.pause().unwrap_err();
    assert!(matches!(&refused, ClientError::Refused { status: 409, .. }), "{refused}");
    assert_eq!(refused.to_string(), "the machine is ending");
}
