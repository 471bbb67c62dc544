//! What ranks tell each other beside tensors: small messages, and whether all of them succeeded.
//!
//! An error on one rank must end all of them: the others would wait for it in the next exchange.
//! So whatever can fail on one rank alone (a disk, a file) passes through [`together`].

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::Serialize;
use serde::de::DeserializeOwned;
use ttt_parallel::Mesh;

use crate::device::read_f32;
use crate::error::TrainError;

/// Every rank's message, in rank order.
///
/// # Errors
/// If a rank is lost.
pub fn gather_bytes(mesh: &Mesh, device: &Device, own: &[u8]) -> Result<Vec<Vec<u8>>, TrainError> {
    if mesh.world.size() == 1 {
        return Ok(vec![own.to_vec()]);
    }
    // Small whole numbers are exact in f32.
    let gather = |values: Vec<f32>| {
        let len = values.len();
        let tensor = Tensor::from_data(TensorData::new(values, [len]), (device, DType::F32));
        read_f32(&mesh.world.all_gather(tensor)?)
    };
    let length = [(own.len() >> 16) as f32, (own.len() & 0xffff) as f32];
    let lengths = gather(length.to_vec())?;
    let (lengths, _) = lengths.as_chunks::<2>();
    let lengths = lengths
        .iter()
        .map(|[high, low]| ((*high as usize) << 16) + *low as usize);
    let longest = lengths.clone().max().unwrap_or(0).max(1);
    let mut bytes: Vec<f32> = own.iter().map(|&byte| f32::from(byte)).collect();
    bytes.resize(longest, 0.0);
    let all = gather(bytes)?;
    let messages = all.chunks(longest).zip(lengths).map(|(bytes, length)| {
        let bytes = bytes[..length].iter();
        bytes.map(|&byte| byte as u8).collect()
    });
    Ok(messages.collect())
}

/// All ranks' values in rank order, if all of them have one.
///
/// # Errors
/// This rank's own error; else the first other rank's, with that rank's number; or if a rank is
/// lost.
pub fn together<T: Serialize + DeserializeOwned>(
    mesh: &Mesh,
    device: &Device,
    own: Result<T, TrainError>,
) -> Result<Vec<T>, TrainError> {
    let message = match &own {
        Ok(value) => Ok(value),
        Err(error) => Err(error.to_string()),
    };
    let message = serde_json::to_vec(&message).expect("messages are plain data");
    let all = gather_bytes(mesh, device, &message)?;
    own?;
    let read = |(rank, message): (usize, Vec<u8>)| {
        let garbled = |error: serde_json::Error| Err(format!("sent no message ({error})"));
        let message: Result<T, String> = serde_json::from_slice(&message).unwrap_or_else(garbled);
        message.map_err(|problem| TrainError::OtherRank { rank, problem })
    };
    all.into_iter().enumerate().map(read).collect()
}

/// This rank's value, if all ranks have theirs.
///
/// # Errors
/// As [`together`].
pub fn all_or_none<T>(
    mesh: &Mesh,
    device: &Device,
    own: Result<T, TrainError>,
) -> Result<T, TrainError> {
    match own {
        Ok(value) => together(mesh, device, Ok(())).map(|_| value),
        Err(error) => match together::<()>(mesh, device, Err(error)) {
            Ok(_) => unreachable!("this rank's own error is returned"),
            Err(error) => Err(error),
        },
    }
}
