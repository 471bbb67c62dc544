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
    let (rank, ranks) = (mesh.rank(), mesh.size());
    if ranks == 1 {
        return Ok(vec![own.to_vec()]);
    }
    // A sum in which every rank fills its own place. Small whole numbers are exact in f32.
    let sum = |values: Vec<f32>| {
        let len = values.len();
        let tensor = Tensor::from_data(TensorData::new(values, [len]), (device, DType::F32));
        read_f32(&mesh.all_reduce_sum(tensor)?)
    };
    let mut lengths = vec![0.0; 2 * ranks];
    (lengths[2 * rank], lengths[2 * rank + 1]) =
        ((own.len() >> 16) as f32, (own.len() & 0xffff) as f32);
    let lengths: Vec<usize> = sum(lengths)?
        .chunks(2)
        .map(|pair| ((pair[0] as usize) << 16) + pair[1] as usize)
        .collect();
    let begin: usize = lengths[..rank].iter().sum();
    let mut bytes = vec![0.0; lengths.iter().sum::<usize>().max(1)];
    for (place, &byte) in bytes[begin..].iter_mut().zip(own) {
        *place = f32::from(byte);
    }
    let mut bytes = sum(bytes)?.into_iter().map(|byte| byte as u8);
    let parts = lengths
        .iter()
        .map(|&len| bytes.by_ref().take(len).collect());
    Ok(parts.collect())
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
