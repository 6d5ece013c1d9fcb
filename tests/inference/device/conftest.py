from expertd_testing.fake_device import offer_fake_devices

offer_fake_devices()
