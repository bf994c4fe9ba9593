//! `harrier inspect`: everything that is known, as a JSON array.

use harrier_control::{Registry, RegistryError};
use serde_json::Value;

use super::{print_line, ps};
use crate::exit::{Failure, HARRIER_FAILED};
use crate::flags::InspectFlags;

pub(super) fn run(flags: &InspectFlags, registry: &Registry) -> Result<u8, Failure> {
    let mut list = Vec::new();
    let mut code = 0;
    for name in &flags.machines {
        let found = registry.find(name).and_then(|entry| match ps::status(&entry) {
            Some(status) => Ok(ps::to_json(&entry, &status)),
            None => Err(RegistryError::NotFound(name.clone())),
        });
        match found {
            Ok(object) => list.push(object),
            Err(err) => {
                crate::print_failure(&Failure::new(err));
                code = HARRIER_FAILED;
            }
        }
    }
    print_line(format!("{:#}", Value::Array(list)))?;
    Ok(code)
}
