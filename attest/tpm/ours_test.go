package tpm

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// TestParseOurs shows that what is read by hand is what go-tpm reads.
func TestParseOurs(t *testing.T) {
	for _, restricted := range []bool{true, false} {
		area := signingTemplate(restricted, [32]byte{1, 2, 3})
		data := tpm2.Marshal(area)
		byHand := parseOurs(data)
		if byHand == nil || !bytes.Equal(tpm2.Marshal(byHand.area), data) {
			t.Fatalf("restricted %t: %x is not read by hand", restricted, data)
		}
		byLibrary, err := parse[tpm2.TPMTPublic](data)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(byHand.area.ObjectAttributes, byLibrary.ObjectAttributes) || byHand.area.Type != byLibrary.Type {
			t.Errorf("restricted %t: %+v and %+v", restricted, byHand.area, byLibrary)
		}
		for i := range data {
			if parseOurs(data[:i]) != nil {
				t.Errorf("first %d bytes were read", i)
			}
		}
		if parseOurs(append(data, 0)) != nil {
			t.Error("rubbish behind was read")
		}
		other := bytes.Clone(data)
		other[6] ^= 0x04 // another attribute
		if parseOurs(other) != nil {
			t.Error("another template was read as ours")
		}
	}
}

// FuzzParseOurs compares both readers.
func FuzzParseOurs(f *testing.F) {
	f.Add(tpm2.Marshal(akTemplate()))
	f.Add(tpm2.Marshal(credentialTemplate([32]byte{1})))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p := parseOurs(data); p != nil {
			if _, err := parse[tpm2.TPMTPublic](data); err != nil {
				t.Errorf("go-tpm does not read what we read by hand: %v", err)
			}
			if !bytes.Equal(tpm2.Marshal(p.area), data) {
				t.Error("encoding it again gives other bytes")
			}
		}
	})
}
