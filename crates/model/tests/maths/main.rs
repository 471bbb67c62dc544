//! Whole models on the CPU: who sees whom, what a new model starts from, decoding, gradients.

mod causality;
mod decoding;
mod documents;
mod gradients;
mod initialisation;
mod support;
mod whole_model;
