package gate

import (
	"encoding/json"
	"testing"
)

func FuzzCardRequest(f *testing.F) {
	one := []byte{1}
	good, err := json.Marshal(CardRequest{CSR: one, Key: one, Storage: one, Certify: one, CertifySig: one})
	if err != nil {
		f.Fatal(err)
	}
	if _, err := ParseCardRequest(good); err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseCardRequest(data)
		if (r == nil) == (err == nil) {
			t.Fatalf("%v, %v", r, err)
		}
		if r != nil && (len(data) > MaxCardRequest || len(r.CSR) == 0 || len(r.Key) == 0 || len(r.Storage) == 0 || len(r.Certify) == 0 || len(r.CertifySig) == 0) {
			t.Fatal("taken with a part missing")
		}
	})
}
