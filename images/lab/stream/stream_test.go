package stream

import (
	"bytes"
	"encoding/binary"
	"net"
	"testing"
)

func TestBytesAndFramesArriveAndAreCounted(t *testing.T) {
	for _, frames := range []bool{false, true} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan Result, 1)
		done := make(chan error, 1)
		go func() {
			done <- Serve(l, frames, func(r Result, err error) {
				if err != nil {
					t.Error(err)
				}
				got <- r
			})
		}()
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		sent, err := Send(conn, 1<<20, frames)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if r := <-got; r != sent || r.Bytes < 1<<20 || r.Mbps() <= 0 {
			t.Errorf("frames %v: receiver saw %+v, sender heard %+v", frames, r, sent)
		}
		l.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestAbsurdStreamsAreRefused(t *testing.T) {
	if _, err := Send(nil, MaxBytes+1, false); err == nil {
		t.Error("a stream of more than MaxBytes was begun")
	}
	a, b := net.Pipe()
	go func() {
		a.Write(binary.BigEndian.AppendUint64(nil, 1<<63))
		a.Close()
	}()
	if _, err := Receive(b, false); err == nil {
		t.Error("a stream of 2^63 bytes was accepted")
	}
	if _, err := ParseResult([]byte("{}")); err == nil {
		t.Error("an empty result was read")
	}
	if _, err := ParseResult(bytes.Repeat([]byte("x"), 100)); err == nil {
		t.Error("noise was read as a result")
	}
}
